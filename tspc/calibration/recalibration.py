"""Measures the statistics of batch norms again, on the calibration images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tspc.calibration.samples import Samples
from tspc.calibration.sensitivity import enough
from tspc.decompositions import double
from tspc.system.modes import own_modes

BatchNorm = nn.modules.batchnorm._BatchNorm


@own_modes()
def recalibrate_(model: nn.Module, reference: nn.Module, samples: Samples) -> None:
    """Replaces running means and variances by those of the calibration images, if the settings say so.

    `auto` keeps the statistics, old or new, that bring the network's answers closer to the reference's.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    choice = samples.settings.batch_norm
    if choice == "keep" or not norms or len(next(iter(samples))) < 2:
        return
    before = {id(norm): {k: v.clone() for k, v in norm.state_dict().items()} for norm in norms}
    if choice == "recalibrate":
        _measure_(model, norms, samples)
        return
    wanted = _answers(reference, samples)
    distance = _distance(model, wanted, samples)
    _measure_(model, norms, samples)
    if not _distance(model, wanted, samples) < distance:
        for norm in norms:
            norm.load_state_dict(before[id(norm)])


@torch.no_grad()
def _measure_(model: nn.Module, norms: list[BatchNorm], samples: Samples) -> None:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
        norm.train()
    size = 0
    for images in samples:
        size = size or len(images)
        if len(images) == size:  # a smaller last batch would have the same weight as a whole one
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def _answers(model: nn.Module, samples: Samples) -> list[Any]:
    """The network's answers to enough images, or to all if there are fewer; batch by batch."""
    return [model(images) for images in enough(samples)]


def _distance(model: nn.Module, wanted: list[Any], samples: Samples) -> float:
    """Squared distance of the network's answers from `wanted`, summed over the images; 0 if it is unknown."""
    if not all(isinstance(answer, Tensor) for answer in wanted):
        return 0.0
    pairs = zip(_answers(model, samples), wanted, strict=True)
    return sum(float((double(answer) - double(target)).square().sum()) for answer, target in pairs)
