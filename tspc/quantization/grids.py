"""Symmetric grids: integers of a few bits times a scale for each row of a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tspc.decompositions import Shape

BITS = (32, 16, 8, 6, 5, 4, 3)
"""Widths of an entry; 32 is a float32 number, and the others are integers with a scale."""
FULL = 32
SCALE_BYTES = 2
"""A scale is a bfloat16 number."""
VECTOR_BYTES = 2
"""Beside factors on grids a number of a bias or a norm is a float16 number."""
LONG_ROW = 8
"""A factor with shorter rows has one scale for all of them: scales of their own would take much of the memory."""
SHRINKS = tuple(1 - 0.04 * step for step in range(16))
"""Shares of a row's largest entry that its grid may reach; what is beyond is clipped."""


def row_count(shape: Shape) -> int:
    """The number of scales of a factor: one for each entry of the first axis, or one for all."""
    return shape[0] if math.prod(shape[1:]) >= LONG_ROW else 1


def factor_bytes(shape: Shape, bits: int, entry_bytes: int = 4) -> int:
    """The bytes of a factor of this shape, with its scales; with 32 bits those of its floating-point numbers."""
    entries = math.prod(shape)
    return entry_bytes * entries if bits == FULL else -(-entries * bits // 8) + SCALE_BYTES * row_count(shape)


@dataclass(frozen=True)
class Grid:
    """The multiples of a scale that an entry can be: `scales` has one for each row (R), or one for all (1)."""

    bits: int
    scales: Tensor

    @property
    def largest(self) -> int:
        """The largest integer; the smallest one is its negative."""
        return 2 ** (self.bits - 1) - 1

    def integers(self, factor: Tensor) -> Tensor:
        """The nearest integers, as whole numbers in float32 or float64: 16 bits have too few digits for them."""
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        return (wide / self._spread(wide)).round().clamp(-self.largest, self.largest)

    def values(self, integers: Tensor, dtype: torch.dtype) -> Tensor:
        """What the integers stand for."""
        return (integers * self._spread(integers)).to(dtype)

    def rounded(self, factor: Tensor) -> Tensor:
        """The nearest values on the grid, in the factor's dtype."""
        return self.values(self.integers(factor), factor.dtype)

    def straight_through(self, factor: Tensor) -> Tensor:
        """The nearest values on the grid, with the gradient of the factor (Bengio, Léonard & Courville, 2013)."""
        return self.rounded(factor).detach() + (factor - factor.detach())  # exactly the rounded values

    def to(self, device: torch.device) -> Grid:
        """The same grid on a device."""
        return replace(self, scales=self.scales.to(device, torch.float32))

    def _spread(self, factor: Tensor) -> Tensor:
        return self.scales.to(factor).reshape(-1, *(1 for _ in factor.shape[1:]))


def as_scales(values: Tensor) -> Tensor:
    """Positive scales in float32, rounded up to what a file holds; a row of zeros has the scale 1."""
    wide = values.float()
    near = wide.to(torch.bfloat16).float()
    above = (near.view(torch.int32) + 2**16).view(torch.float32)
    scales = torch.where(near < wide, above, near)
    return torch.where((scales > 0) & scales.isfinite(), scales, torch.ones_like(scales))


def grid_for(factor: Tensor, bits: int, importance: Tensor | None = None) -> Grid:
    """The grid of each row with the least squared error of rounding, among several widths.

    `importance` weights the entries of a row; it is of a row's size, or of the factor's.
    """
    if not factor.numel():
        return Grid(bits, factor.new_ones(row_count(tuple(factor.shape)), dtype=torch.float32))
    rows = factor.reshape(row_count(tuple(factor.shape)), -1)
    weights = torch.ones_like(rows[:1]) if importance is None else importance.to(rows).expand(factor.shape[0], -1)
    weights = weights if len(weights) in (1, len(rows)) else weights.reshape(1, -1)
    largest = rows.abs().amax(1)
    best, least = as_scales(largest), torch.full_like(largest, math.inf)
    limit = 2 ** (bits - 1) - 1
    for shrink in SHRINKS if bits < 16 else (1.0,):
        scales = as_scales(largest * shrink / limit)
        grid = Grid(bits, scales)
        errors = (weights * (grid.rounded(rows) - rows).square()).sum(1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return Grid(bits, best)
