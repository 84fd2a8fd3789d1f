"""Chains of ordinary convolutions that equal one convolution, with or without merged links.

A *path* is how a tensorized layer computes. "chain" runs every link. "rebuilt" contracts the dense kernel and convolves
once. "1|23", for example, runs the first link, then the second and third link merged into one kernel. All paths of a
layer give the same output and the same gradients, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tspc.decompositions import Decomposition, Factors, Rank, Shape
from tspc.errors import ConfigError

CHAIN, REBUILT = "chain", "rebuilt"


@dataclass(frozen=True)
class Stage:
    """One convolution of a path: the kernel's shape (out, in of one group, height, width), and its spatial axes."""

    shape: Shape
    covered: str
    groups: int

    @property
    def channels(self) -> int:
        """Input channels."""
        return self.shape[1] * self.groups


def groupings(count: int) -> list[str]:
    """All ways to merge neighbours in a chain of `count` links, as names of paths; the whole chain comes first."""
    found = []
    for cuts in range(2 ** (count - 1) - 1, -1, -1):
        name = "".join(
            f"{i + 1}" + ("|" if i < count - 1 and cuts >> (count - 2 - i) & 1 else "") for i in range(count)
        )
        found.append(_shortened(name, count))
    return found


def _shortened(name: str, count: int) -> str:
    return {"|".join(map(str, range(1, count + 1))): CHAIN, "".join(map(str, range(1, count + 1))): REBUILT}.get(
        name, name
    )


def paths_of(decomposition: Decomposition, shape: Shape, rank: Rank, groups: int = 1) -> list[str]:
    """The paths of a layer with this kernel. The last one is "rebuilt"; every layer has it."""
    links = decomposition.links(shape, rank) if groups == 1 else None
    return [REBUILT] if links is None or len(links) == 1 else groupings(len(links))


def members(path: str, count: int) -> list[range]:
    """The links that each stage of a path merges. Raises ConfigError for a path that does not exist."""
    if path not in groupings(count):
        raise ConfigError([f"path {path!r} does not exist here; choose one of {', '.join(groupings(count))}"])
    if path == CHAIN:
        return [range(i, i + 1) for i in range(count)]
    if path == REBUILT:
        return [range(count)]
    starts = [int(part[0]) - 1 for part in path.split("|")]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def stages_of(decomposition: Decomposition, shape: Shape, rank: Rank, path: str, groups: int = 1) -> list[Stage]:
    """The convolutions of a path, in order. `shape` has four entries, or two for a dense layer."""
    t, s, *window = (*shape, 1, 1)[:4]
    if path == REBUILT:
        return [Stage((t, s, *window), "hw", groups)]
    links = decomposition.links(shape, rank)
    assert links is not None
    stages: list[Stage] = []
    channels = s
    for merged in members(path, len(links)):
        stage = _merged_stage([Stage(*link, 1) for link in (links[i] for i in merged)], channels)
        stages.append(stage)
        channels = stage.shape[0]
    return stages


def _merged_stage(links: list[Stage], channels: int) -> Stage:
    """One link as a stage, or several: the kernel of several is always dense."""
    window = [1, 1]
    for link in links:
        window = [max(a, b) for a, b in zip(window, link.shape[2:], strict=True)]
    inputs = links[0].shape[1] if len(links) == 1 else channels
    covered = "".join(axis for axis in "hw" if any(axis in link.covered for link in links))
    return Stage((links[-1].shape[0], inputs, *window), covered, channels // inputs)


def merged(kernels: Sequence[Tensor], channels: int) -> Tensor:
    """The kernel of one convolution that equals several in sequence. No two of them convolve over the same axis.

    Kernels are (out, in of one group, height, width), and may have any number of groups. `channels` is the number of
    input channels of the first one. The kernel of several is dense: it has one group. Differentiable.
    """
    first, *others = kernels
    for other in others:
        groups, others_groups = channels // first.shape[1], len(first) // other.shape[1]
        if others_groups > 1:
            first = _ungrouped(first, groups)
            parts = first.unflatten(0, (others_groups, -1)), other.unflatten(0, (others_groups, -1))
            product = torch.einsum("gmshw,gomij->goshwij", *parts).flatten(0, 1)
        elif groups > 1:
            parts = first.unflatten(0, (groups, -1)), other.unflatten(1, (groups, -1))
            product = torch.einsum("gmshw,tgmij->tgshwij", *parts).flatten(1, 2)
        else:
            product = torch.einsum("mshw,tmij->tshwij", first, other)
        t, s, h, w, i, j = product.shape
        first = product.permute(0, 1, 2, 4, 3, 5).reshape(t, s, h * i, w * j)
    return first


def _ungrouped(kernel: Tensor, groups: int) -> Tensor:
    """A grouped kernel for all channels, with zeros between the groups."""
    if groups == 1:
        return kernel
    spread = torch.einsum("goihw,gk->gokihw", kernel.unflatten(0, (groups, -1)), torch.eye(groups).to(kernel))
    return spread.flatten(2, 3).flatten(0, 1)


def contracted(decomposition: Decomposition, factors: Factors, path: str) -> list[Tensor]:
    """The kernels of a path's stages, (out, in of one group, height, width); differentiable in the factors."""
    if path == REBUILT:
        return [_four(decomposition.reconstruct(factors))]
    links = decomposition.link_kernels(factors)
    found: list[Tensor] = []
    channels = factors.shape[1]
    for parts in members(path, len(links)):
        found.append(merged([_four(links[i]) for i in parts], channels))
        channels = found[-1].shape[0]
    return found


def _four(kernel: Tensor) -> Tensor:
    return kernel[:, :, None, None] if kernel.ndim == 2 else kernel
