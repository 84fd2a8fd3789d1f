"""Batch norm statistics taken anew on the calibration images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tspc.calibration import Samples

BatchNorm = nn.modules.batchnorm._BatchNorm


def recalibrate_(model: nn.Module, reference: nn.Module, samples: Samples) -> None:
    """Replaces running means and variances by those that the calibration images give, as the settings say.

    `auto` keeps the better: the statistics at which the network's answers are closer to the reference's.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    choice = samples.settings.batch_norm
    if choice == "keep" or not norms or len(next(iter(samples))) < 2:
        return
    before = {id(norm): {k: v.clone() for k, v in norm.state_dict().items()} for norm in norms}
    distance = _distance(model, reference, samples) if choice == "auto" else None
    _measure_(model, norms, samples)
    if distance is not None and not _distance(model, reference, samples) < distance:
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
        if len(images) == size:  # a smaller last batch would count as much as a whole one
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def _distance(model: nn.Module, reference: nn.Module, samples: Samples) -> float:
    """Squared distance of the networks' answers, summed over the images; 0 if they cannot be compared."""
    total = 0.0
    for images in samples:
        answer, wanted = model(images), reference(images)
        if not isinstance(answer, Tensor):
            return 0.0
        total += float((answer - wanted).square().sum())
    return total
