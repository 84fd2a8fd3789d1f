"""Whether the shapes inside a network follow from the sizes of its inputs, and from nothing in their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Shapes = tuple[torch.Size, ...]


def is_regular(found: Sequence[Shapes], sizes: Sequence[Shapes]) -> bool:
    """Whether all batches of one size have the same shapes `found` inside the network.

    `sizes` are, for each batch, the shapes of all its tensors: an encoder's may be alike where a decoder's differ. A
    router in a mixture of experts chooses by the values which rows an expert gets. If no two batches have the same
    size, as with texts of many lengths, every axis must be constant, or in proportion to the number of inputs N, to a
    length L (any other axis of an input), or to N·L.
    """
    by_size: dict[Shapes, list[Shapes]] = {}
    for shapes, size in zip(found, sizes, strict=True):
        by_size.setdefault(size, []).append(shapes)
    if any(shapes != group[0] for group in by_size.values() for shapes in group):
        return False
    kinds = {tuple(shape[1:] for shape in size) for size in sizes}
    if len(kinds) < 2 or any(len(group) > 1 for group in by_size.values()):
        return True
    return _is_in_proportion([[*map(list, group[0])] for group in by_size.values()], list(by_size))


def _is_in_proportion(found: list[list[list[int]]], sizes: list[Shapes]) -> bool:
    ranks = [[len(shape) for shape in shapes] for shapes in found]
    if any(rank != ranks[0] for rank in ranks):
        return False
    axes = [[axis for shape in shapes for axis in shape] for shapes in found]
    units = [_units(size) for size in sizes]
    if any(len(unit) != len(units[0]) for unit in units):
        return False
    pairs = list(zip(axes, units, strict=True))
    return all(
        any(
            all(own[axis] * units[0][u] == axes[0][axis] * unit[u] for own, unit in pairs) for u in range(len(units[0]))
        )
        for axis in range(len(axes[0]))
    )


def _units(size: Shapes) -> list[int]:
    """1, the number of inputs N, and for each further axis L of a tensor L and N·L."""
    lengths = [axis for shape in size for axis in shape[1:]]
    return [1, size[0][0], *(unit for length in lengths for unit in (length, size[0][0] * length))]
