"""Whether the shapes inside a network follow from the sizes of its inputs, and from nothing in their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Shapes = tuple[torch.Size, ...]


def is_regular(found: Sequence[Shapes], sizes: Sequence[torch.Size]) -> bool:
    """Whether all batches of one size have the same shapes `found` inside the network; `sizes` are their inputs'.

    A router in a mixture of experts chooses by the values which rows an expert gets. If no two batches have the same
    size, as with texts of many lengths, every axis must be constant, or in proportion to the number of inputs N, to
    their length L, or to N·L.
    """
    by_size: dict[torch.Size, list[Shapes]] = {}
    for shapes, size in zip(found, sizes, strict=True):
        by_size.setdefault(size, []).append(shapes)
    if any(shapes != group[0] for group in by_size.values() for shapes in group):
        return False
    if len({size[1:] for size in sizes}) < 2 or any(len(group) > 1 for group in by_size.values()):
        return True
    return _is_in_proportion([[*map(list, group[0])] for group in by_size.values()], list(by_size))


def _is_in_proportion(found: list[list[list[int]]], sizes: list[torch.Size]) -> bool:
    ranks = [[len(shape) for shape in shapes] for shapes in found]
    if any(rank != ranks[0] for rank in ranks):
        return False
    axes = [[axis for shape in shapes for axis in shape] for shapes in found]
    units = [[1, size[0], *([size[1], size[0] * size[1]] if len(size) > 1 else [])] for size in sizes]
    if any(len(unit) != len(units[0]) for unit in units):
        return False
    pairs = list(zip(axes, units, strict=True))
    return all(
        any(
            all(own[axis] * units[0][u] == axes[0][axis] * unit[u] for own, unit in pairs) for u in range(len(units[0]))
        )
        for axis in range(len(axes[0]))
    )
