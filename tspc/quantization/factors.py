"""Factors on grids, with a small error of the layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tspc.decompositions import Decomposition, Factors, Metric, Shape
from tspc.decompositions.kernels import levels
from tspc.quantization.grids import Grid, grid_for
from tspc.quantization.links import Inputs
from tspc.quantization.rounding import with_feedback
from tspc.system.modes import own_modes

OF_ONE, OF_CHAIN = 0.3, 0.5
"""About what error feedback leaves of the squared error of rounding to nearest, for one link and for a chain."""
FEW = 512
"""So many rows of a table show what it leaves there."""


@dataclass(frozen=True)
class Quantized:
    """Factors whose entries lie on grids, one grid for each factor."""

    factors: Factors
    grids: tuple[Grid, ...]


@own_modes()
@torch.no_grad()
def nearest(factors: Factors, bits: int) -> Quantized:
    """Each entry rounded to the nearest value on its row's grid, without a look at the outputs."""
    grids = tuple(grid_for(tensor, bits) for tensor in factors.tensors)
    return _on(factors, grids, [grid.rounded(tensor) for grid, tensor in zip(grids, factors.tensors, strict=True)])


@own_modes()
@torch.no_grad()
def quantized(
    method: Decomposition, factors: Factors, kernel: Tensor, bits: int, metric: Metric | None = None
) -> Quantized:
    """The factors of `kernel` in `bits` bits; in the norm of `metric` their error is at most that of `nearest`.

    Without a metric it is `nearest`.

    In a chain the links are rounded one after the other, with error feedback along the second moments of their own
    inputs (`rounding`). The inputs are those that the links before give once they are rounded, and the last link is
    first fitted to what the kernel gives. Before that the channels between the links are scaled, which changes nothing
    in the layer, so that each column of a link has entries of about the same size.
    """
    plain = nearest(factors, bits)
    found = None if metric is None else _chain(method, factors, kernel, bits, metric)
    if found is None or metric is None:
        return plain
    error = lambda of: metric.squared((kernel - method.reconstruct(of.factors).to(kernel)).flatten(1))  # noqa: E731
    return min((plain, found), key=error)


def expected_share(method: Decomposition, shape: Shape, metric: Metric | None) -> float:
    """About how much of the squared error of `nearest` is left with `quantized`."""
    axes = None if metric is None else method.chain_axes(shape)
    return 1.0 if axes is None else OF_ONE if len(axes) == 1 else OF_CHAIN


def measured_share(method: Decomposition, kernel: Tensor, bits: int, metric: Metric | None) -> float:
    """The same for a table (tokens × length), measured on a few of its rows; each row is rounded on its own."""
    if metric is None:
        return 1.0
    few = kernel[:: max(1, len(kernel) // FEW)]
    weights = None if metric.outputs is None else metric.outputs[:: max(1, len(kernel) // FEW)]
    norm, factors = Metric(metric.inputs, weights), Factors((few,), tuple(few.shape), ())
    found = quantized(method, factors, few, bits, norm), nearest(factors, bits)
    ours, plain = (norm.squared(few - each.factors.tensors[0]) for each in found)
    return ours / plain if plain > 0 else 1.0


def _chain(method: Decomposition, factors: Factors, kernel: Tensor, bits: int, metric: Metric) -> Quantized | None:
    """The links of a chain, rounded one after the other; None if the factors are not the links of one."""
    axes = method.chain_axes(factors.shape)
    links = [_four(tensor) for tensor in method.tensors_of(factors)]
    if axes is None or not all(_is_link(link, links[i - 1] if i else None, kernel) for i, link in enumerate(links)):
        return None
    links = [link.to(torch.float32) for link in links]
    if not method.has_basis:  # else the first link has constants
        links = _balanced(links)
    inputs = Inputs.of_layer(metric, factors.shape)
    targets = inputs.rows.flatten(1) @ kernel.flatten(1).to(inputs.rows).mT
    grids, found = [], []
    for i, (link, covered) in enumerate(zip(links, axes, strict=True)):
        is_depthwise = _is_depthwise(link, links[i - 1] if i else None)
        if 0 < i == len(links) - 1 and not is_depthwise:
            fitted = inputs.fitted(targets, tuple(link.shape))
            link = fitted if bool(fitted.isfinite().all()) else link
        moments, free = inputs.moments(covered, is_depthwise), method.free_columns(factors) if i == 0 else None
        if free is None:
            grids.append(grid_for(link, bits, moments.diagonal(dim1=-2, dim2=-1)))
            found.append(with_feedback(link.flatten(1), grids[-1], moments))
            link = found[-1].reshape(link.shape)
        else:
            part, moments = link.flatten(1)[:, free], moments[free][:, free]
            grids.append(grid_for(part, bits, moments.diagonal()))
            found.append(with_feedback(part, grids[-1], moments))
            link = link.flatten(1).masked_scatter(free, found[-1]).reshape(link.shape)
        inputs = inputs.after(link, covered, is_depthwise)
    return _on(factors, grids, found)


def _on(factors: Factors, grids: Sequence[Grid], tensors: Sequence[Tensor]) -> Quantized:
    like, level = factors.tensors, levels(tensors) if factors.basis is None else [1.0] * len(tensors)
    own = tuple((new * by).reshape(old.shape).to(old) for new, old, by in zip(tensors, like, level, strict=True))
    scales = tuple(Grid(g.bits, g.scales * by).to(old.device) for g, old, by in zip(grids, like, level, strict=True))
    return Quantized(replace(factors, tensors=own), scales)


def _four(link: Tensor) -> Tensor:
    return link.reshape(*link.shape, *(1,) * (4 - link.ndim))


def _is_depthwise(link: Tensor, before: Tensor | None) -> bool:
    return before is not None and link.shape[1] == 1 and len(link) == len(before) and len(link) > 1


def _is_link(link: Tensor, before: Tensor | None, kernel: Tensor) -> bool:
    """Whether a link takes all channels, or each one alone; other groups are not known here."""
    channels = kernel.shape[1] if before is None else len(before)
    return link.shape[1] == channels or _is_depthwise(link, before)


def _balanced(links: list[Tensor]) -> list[Tensor]:
    """The same chain, in which the entries that a link has for each of its channels are about equally large."""
    links = list(links)
    for i in range(len(links) - 1, 0, -1):
        if _is_depthwise(links[i], links[i - 1]):
            sizes = links[i].abs().amax((1, 2, 3))
            sizes = torch.where(sizes > 0, sizes, 1.0)
            links[i] = links[i] / sizes[:, None, None, None]
        else:
            sizes = links[i].square().mean((0, 2, 3)).sqrt()
            sizes = torch.where(sizes > 0, sizes, 1.0)
            links[i] = links[i] / sizes[None, :, None, None]
        links[i - 1] = links[i - 1] * sizes[:, None, None, None]
    return links
