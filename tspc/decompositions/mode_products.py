"""Products of a tensor's modes with matrices, where an axis of the tensor may hold several modes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tspc.decompositions.kernels import Axes

SMALL, FEW = 64, 16
"""Modes of together so many entries are multiplied at once; a mode with fewer entries behind it is moved to the end."""


def on_factors(tensors: Sequence[Tensor], axes: Axes, matrices: Mapping[str, Tensor]) -> list[Tensor]:
    """The factors of a kernel whose modes are multiplied by matrices (n × q; a vector means a diagonal)."""
    sizes = axes.outputs | axes.inputs
    return [multiplied(t, modes, sizes, matrices) for t, modes in zip(tensors, axes.factors, strict=True)]


def multiplied(
    tensor: Tensor, modes: Sequence[Sequence[str]], sizes: Mapping[str, int], matrices: Mapping[str, Tensor]
) -> Tensor:
    """Multiplies every mode that has a matrix (n × q) by it. An axis may hold several modes or none.

    A vector means a diagonal matrix.
    """
    shape = list(tensor.shape)
    for axis, names in enumerate(modes):
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        parts = _side_by_side([(sizes[name], matrices.get(name)) for name in names])
        for number, (n, matrix) in enumerate(parts):
            if matrix is not None:
                outer = before * math.prod(size for size, _ in parts[:number])
                inner = after * math.prod(size for size, _ in parts[number + 1 :])
                tensor = _times(tensor.reshape(outer, n, inner), matrix.to(tensor))
                parts[number] = tensor.shape[1], None
        shape[axis] = math.prod(size for size, _ in parts) if names else shape[axis]
    return tensor.reshape(shape)


def _times(tensor: Tensor, matrix: Tensor) -> Tensor:
    """The middle axis of a tensor (a × n × b) multiplied by a matrix (n × q), or by a diagonal one (n)."""
    if matrix.ndim == 1:
        return tensor * matrix[:, None]
    if 1 < tensor.shape[2] < FEW:  # many small products are slower than a copy
        return (tensor.mT @ matrix).mT
    return (tensor[..., 0] @ matrix)[..., None] if tensor.shape[2] == 1 else matrix.mT @ tensor


def _side_by_side(parts: list[tuple[int, Tensor | None]]) -> list[tuple[int, Tensor | None]]:
    """Neighbouring small modes as one, because each product reads the whole tensor."""
    found: list[tuple[int, Tensor | None]] = []
    for n, matrix in parts:
        size, last = found[-1] if found else (SMALL, None)
        if last is not None and matrix is not None and last.ndim == matrix.ndim and size * n <= SMALL:
            found[-1] = size * n, torch.kron(last, matrix.to(last))
        else:
            found.append((n, matrix))
    return found
