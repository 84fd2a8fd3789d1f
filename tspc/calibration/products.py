"""Sums of products of rows, added up where they are computed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tspc.decompositions import double

NARROW, BLOCKS = 128, 6
"""Up to this number of columns a product aᵀa is computed as a whole; else in about so many blocks."""
ADDITIONS = 32
"""So many products are added up in the rows' own precision, before float64 takes their sum."""
WIDEST_OUTPUT = 4096
"""With more outputs than this, only the diagonals of their second moments and weights are kept."""


class Products:
    """Σ aᵀb over rows a (groups × m × k) and b (groups × m × n); without `columns`, Σ aᵀa.

    Of aᵀa only the blocks up to the diagonal are computed. With `is_rough` the sum stays in the rows' own precision.
    """

    def __init__(
        self, groups: int, rows: int, columns: int | None, device: torch.device, is_rough: bool = False
    ) -> None:
        self._shape = (groups, rows, rows if columns is None else columns)
        self._is_square, self._is_rough, self._device = columns is None, is_rough, device
        self._part: Tensor | None = None
        self._whole: Tensor | None = None
        self._additions = 0

    def add(self, a: Tensor, b: Tensor | None = None) -> None:
        """Adds the product of rows with each other, or with the rows b."""
        if self._part is None:
            self._part = a.new_zeros(self._shape)
        part, a = self._part, a.to(self._part.dtype)
        if b is not None:
            part.baddbmm_(a.mT, b.to(part.dtype))
        for start, end in self._strips() if b is None else ():
            part[:, start:end, :end].baddbmm_(a[..., start:end].mT, a[..., :end])
        self._additions += 1
        if self._additions % ADDITIONS == 0 and not self._is_rough:
            self._take()

    def total(self) -> Tensor:
        """The whole sum (groups × k × n). It belongs to this object, and a caller may change it."""
        self._take()
        whole = self._whole
        if whole is None:
            whole = self._whole = double(torch.zeros(self._shape, device=self._device))
        for start, end in self._strips() if self._is_square else ():
            whole[:, :start, start:end] = whole[:, start:end, :start].mT
        return whole

    def _take(self) -> None:
        """Moves what was added last into the sum."""
        if self._part is None:
            return
        if self._whole is None:
            self._whole, self._part = self._part if self._is_rough else double(self._part), None
        else:
            self._whole += self._part.to(self._whole)
            self._part.zero_()

    def _strips(self) -> list[tuple[int, int]]:
        """The rows of each block."""
        n = self._shape[1]
        return list(pairwise([*range(0, n, max(NARROW, -(-n // BLOCKS))), n]))


class Squares:
    """The diagonal of Σ aᵀa over rows a (groups × m × n)."""

    def __init__(self, groups: int, n: int, device: torch.device) -> None:
        self._sum = double(torch.zeros(groups, n, device=device))

    def add(self, a: Tensor) -> None:
        self._sum += a.square().sum(1).to(self._sum)

    def total(self) -> Tensor:
        """The sum (groups × n)."""
        return self._sum


def is_diagonal(outputs: int) -> bool:
    """Whether only the diagonal is kept of matrices between so many outputs of a layer."""
    return outputs > WIDEST_OUTPUT


def products_of_outputs(groups: int, outputs: int, device: torch.device, is_rough: bool = False) -> Products | Squares:
    """The sum Σ aᵀa over rows of outputs; of a layer with many outputs its diagonal alone."""
    own = outputs // groups
    if is_diagonal(outputs):
        return Squares(groups, own, device)
    return Products(groups, own, None, device, is_rough)
