"""Batch norm statistics taken anew: on the calibration images, and before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc import processes
from tspc.calibration import Samples
from tspc.decompositions import double
from tspc.hooks import evaluating, hooked

BatchNorm = nn.modules.batchnorm._BatchNorm
JUDGES = 128
"""Images by whose answers the better statistics are chosen."""
SHOWN = 512
"""Training images by which batch norms are set before training."""


def recalibrate_(model: nn.Module, reference: nn.Module, samples: Samples) -> None:
    """Replaces running means and variances by those that the calibration images give, as the settings say.

    `auto` keeps the better: the statistics at which the network's answers are closer to the reference's.
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
        if len(images) == size:  # a smaller last batch would count as much as a whole one
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def _answers(model: nn.Module, samples: Samples) -> list[Any]:
    """The network's answers to at least JUDGES images, where there are as many; batch by batch."""
    answers, count = [], 0
    for images in samples:
        if count >= JUDGES:
            break
        answers.append(model(images))
        count += len(images)
    return answers


def _distance(model: nn.Module, wanted: list[Any], samples: Samples) -> float:
    """Squared distance of the network's answers from those wanted, summed over the images; 0 if it is not known."""
    if not all(isinstance(answer, Tensor) for answer in wanted):
        return 0.0
    pairs = zip(_answers(model, samples), wanted, strict=True)
    return sum(float((answer - target).square().sum()) for answer, target in pairs)


@torch.no_grad()
def rebase_(network: nn.Module, run: Callable[[], object]) -> None:
    """Lets batch norms normalise by what they see now, without changing what the network answers in eval mode.

    While `run` sends images through the network, means and variances of what its batch norms are given are taken. They
    become the running statistics, and weight and bias make up for the change:

        w (x − m) / s + b = w' (x − m') / s' + b'   with   w' = w s' / s,   b' = b + w (m' − m) / s

    In training a batch norm goes by the batch. Compressed layers answer with less variance than the reference's, so
    that without this the first step would meet another network than the one that was fitted: one whose activations,
    and all that is wrong about them, are blown up to the reference's size. What has no weight or no statistics is left
    alone.
    """
    norms = [m for m in network.modules() if isinstance(m, BatchNorm) and m.affine and m.running_mean is not None]
    sums: dict[nn.Module, Tensor] = {}

    def see(norm: nn.Module, args: Any) -> None:
        values = args[0].float()  # widened after the sums, for activations are large
        others = [axis for axis in range(values.ndim) if axis != 1]
        variance, mean = map(double, torch.var_mean(values, others, correction=0))
        count = values.numel() // values.shape[1]
        found = count * torch.stack((torch.ones_like(mean), mean, variance + mean.square()))
        sums[norm] = sums[norm] + found if norm in sums else found

    with evaluating(network), hooked([norm.register_forward_pre_hook(see) for norm in norms]):
        run()
    for norm in norms:
        if norm not in sums:  # never called
            continue
        count, total, squares = processes.summed(sums[norm])
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        old_mean, old_variance = double(cast(Tensor, norm.running_mean)), double(cast(Tensor, norm.running_var))
        old, new = (old_variance + norm.eps).sqrt(), (variance + norm.eps).sqrt()
        norm.bias.add_((double(norm.weight) * (mean - old_mean) / old).to(norm.bias))
        norm.weight.mul_((new / old).to(norm.weight))
        cast(Tensor, norm.running_mean).copy_(mean)
        cast(Tensor, norm.running_var).copy_(variance)
