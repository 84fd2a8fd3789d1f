"""Measures the statistics of batch norms again, on the calibration images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tspc.calibration.samples import Samples
from tspc.calibration.sensitivity import enough
from tspc.data.answers import answer_of
from tspc.data.model_inputs import Given, called, filled
from tspc.decompositions import double
from tspc.system.modes import own_modes
from tspc.traversal.hooks import running

BatchNorm = nn.modules.batchnorm._BatchNorm


@own_modes()
def recalibrate_(model: nn.Module, reference: nn.Module, samples: Samples) -> None:
    """Replaces running means and variances by those of the calibration images, if the settings say so.

    `auto` keeps the statistics, old or new, that bring the network's answers closer to the reference's.
    """
    norms, choice = _norms(model, samples), samples.settings.batch_norm
    if not norms:
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


def passes(model: nn.Module, samples: Samples) -> int:
    """The number of batches that `recalibrate_` sends through the networks."""
    if not _norms(model, samples):
        return 0
    compared = 3 * sum(1 for _ in enough(samples)) if samples.settings.batch_norm == "auto" else 0
    return -(-len(samples) // samples.settings.batch_size) + compared


def _norms(model: nn.Module, samples: Samples) -> list[BatchNorm]:
    """The batch norms that are measured again; none if the settings or the images do not allow it."""
    if samples.settings.batch_norm == "keep" or len(next(iter(samples))) < 2:
        return []
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def _measure_(model: nn.Module, norms: list[BatchNorm], samples: Samples) -> None:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
        norm.train()
    size = 0
    for number, images in enumerate(_counted(samples, samples)):
        size = size or len(images)
        if len(images) == size:  # a smaller last batch would have the same weight as a whole one
            with running(number, samples.short):
                called(model, images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def _answers(model: nn.Module, samples: Samples) -> list[Tensor | None]:
    """The network's answers to enough images, or to all if there are fewer; batch by batch."""
    answers = []
    for number, images in enumerate(_counted(enough(samples), samples)):
        with running(number, samples.short):
            answers.append(answer_of(called(model, images)))
    return answers


def _counted(batches: Iterable[Given], samples: Samples) -> Iterator[Given]:
    for images in batches:
        yield images
        samples.tally.add("batch norms")


def _distance(model: nn.Module, wanted: list[Tensor | None], samples: Samples) -> float:
    """Squared distance of the network's answers from `wanted`, summed over the images; 0 if it is unknown.

    Padded positions of an answer do not count.
    """
    total = 0.0
    for number, (answer, target) in enumerate(zip(_answers(model, samples), wanted, strict=True)):
        if answer is None or target is None:
            return 0.0
        masks = samples.kept.masks(number)
        error = (double(filled(answer, masks)) - double(filled(target, masks))).square()
        total += float(error.sum())
    return total
