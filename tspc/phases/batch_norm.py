"""Sets batch norms before training: solves them for changed inputs, or moves their statistics to their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.recalibration import BatchNorm
from tspc.decompositions import double
from tspc.system import processes
from tspc.system.modes import own_modes
from tspc.traversal.hooks import evaluating, first_argument, hooked

SHOWN = 512
"""Training images by which batch norms are set before training."""


def _fitted_norms(network: nn.Module) -> dict[str, BatchNorm]:
    """Batch norms that have a scale, a shift and running statistics."""
    norms = {name: m for name, m in network.named_modules() if isinstance(m, BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.affine and norm.running_mean is not None}


def count_norms(network: nn.Module) -> int:
    return len(_fitted_norms(network))


@own_modes()
@torch.no_grad()
def refit_norms_(network: nn.Module, reference: nn.Module, run: Callable[[], object]) -> None:
    """Solves the batch norms' scale and shift, one after the other, so that each comes closest to the reference's.

    `run` sends the same images first through the network, then through the reference, batch by batch. Least squares
    are solved for each channel. With x the input of the network's batch norm and y the output of the reference's,

        w = cov(x, y) / √(var(x) + ε),   b = E[y],   running statistics E[x] and var(x).

    This takes only forward passes. It restores the size of activations after their inputs have changed.
    """
    for name, norm in _fitted_norms(network).items():
        waiting: list[Tensor] = []
        found: list[Tensor] = []

        def see(module: nn.Module, args: Any, kwargs: Any, waiting: list[Tensor] = waiting) -> None:
            waiting.append(
                first_argument(args, kwargs).to(torch.float32, copy=True)
            )  # the block may change it in place

        def compare(
            module: nn.Module, args: Any, y: Tensor, waiting: list[Tensor] = waiting, found: list[Tensor] = found
        ) -> None:
            found.append(_sums(waiting.pop(0), y.float()))

        other = reference.get_submodule(name)
        with (
            evaluating(network),
            hooked([norm.register_forward_pre_hook(see, with_kwargs=True), other.register_forward_hook(compare)]),
        ):
            run()
        if not found:
            continue
        count, x, y, xx, xy = processes.summed(torch.stack(found).sum(0))
        mean, target = x / count, y / count
        variance = (xx / count - mean.square()).clamp(min=0)
        norm.weight.copy_((xy / count - mean * target) / (variance + norm.eps).sqrt())
        norm.bias.copy_(target)
        cast(Tensor, norm.running_mean).copy_(mean)
        cast(Tensor, norm.running_var).copy_(variance)


@own_modes()
@torch.no_grad()
def _sums(x: Tensor, y: Tensor) -> Tensor:
    """For every channel the number of values, Σx, Σy, Σx² and Σxy."""
    others = [axis for axis in range(x.ndim) if axis != 1]
    spread, mean = torch.var_mean(x, others, correction=0, keepdim=True)
    target = y.mean(others, keepdim=True)
    together = ((x - mean) * (y - target)).mean(others)
    # Converted to float64 only after the means, because activations are large.
    mean, target, spread, together = (double(value.flatten()) for value in (mean, target, spread, together))
    parts = (torch.ones_like(mean), mean, target, spread + mean.square(), together + mean * target)
    return x.numel() // x.shape[1] * torch.stack(parts)


@own_modes()
@torch.no_grad()
def rebase_(network: nn.Module, run: Callable[[], object]) -> None:
    """Sets the running statistics of batch norms to those of their inputs; the answers in eval mode do not change.

    `run` sends images through the network. The means and variances of the batch norms' inputs become the running
    statistics, and weight and bias are changed to compensate:

        w (x − m) / s + b = w' (x − m') / s' + b'   with   w' = w s' / s,   b' = b + w (m' − m) / s

    In training a batch norm uses the statistics of the batch. The outputs of compressed layers have less variance than
    the reference's. So without this function the first step would start from another network than the fitted one: its
    activations, and their errors, would be scaled up to the reference's size. Batch norms without weight or statistics
    are not changed.
    """
    norms = list(_fitted_norms(network).values())
    sums: dict[nn.Module, Tensor] = {}

    @own_modes()
    @torch.no_grad()
    def see(norm: nn.Module, *given: Any) -> None:
        values = first_argument(*given).float()  # widened after the sums, for activations are large
        others = [axis for axis in range(values.ndim) if axis != 1]
        variance, mean = map(double, torch.var_mean(values, others, correction=0))
        count = values.numel() // values.shape[1]
        found = count * torch.stack((torch.ones_like(mean), mean, variance + mean.square()))
        sums[norm] = sums[norm] + found if norm in sums else found

    with evaluating(network), hooked([norm.register_forward_pre_hook(see, with_kwargs=True) for norm in norms]):
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
