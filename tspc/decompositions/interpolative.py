"""`id`: the matrix of `svd`, with R² numbers fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tspc.decompositions.base import Decomposition
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, double, kernel_dims, levels
from tspc.decompositions.registry import register
from tspc.decompositions.svd import SVD

LARGEST, SWAPS = 1.5, 2
"""Rows are swapped into the basis until no coefficient is larger than this, but at most so many times the rank."""
ZERO, MOST = 128, 60
"""What is added to the exponent of the identity, so that a byte holds it, and how far it may be from 0."""
CHAIN = SVD()


@register()
@dataclass(frozen=True)
class Interpolative(Decomposition):
    """K(s, h, w, t) = Σ_r A(s, h, r) B(r, w, t), R of A's SH rows being an identity; R(SH + WT − R) parameters.

    The kernels are those of `svd` at the same rank. A and B of `svd` are not unique: A·M and M⁻¹·B give the same kernel
    for every M (R × R). Here M makes R rows of A, its basis, an identity, and only the other rows are kept: this is the
    interpolative decomposition of the best matrix of rank R (Cheng, Gimbutas, Martinsson & Rokhlin, SIAM J. Sci.
    Comput. 2005). For language models Zhao et al. use it as PIFA (ICML 2025, arXiv:2501.19090). SH more bits say which
    rows the basis has. The identity is times a power of two, which is in one more byte: so both factors have entries of
    about one size, as optimizers want it (`levels`).

    Chain: as that of `svd`.
    """

    name: ClassVar[str] = "id"

    @property
    def is_spectral(self) -> bool:
        return True

    def max_rank(self, shape: Shape) -> Rank:
        return CHAIN.max_rank(shape)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        t, s, h, w = kernel_dims(shape)
        (r,) = rank
        return (r, s * h - r), ((t, r) if len(shape) == 2 else (t, r, 1, w))

    @property
    def has_basis(self) -> bool:
        return True

    def basis_bytes(self, shape: Shape) -> int:
        _, s, h, _ = kernel_dims(shape)
        return -(-s * h // 8) + 1

    def is_basis(self, basis: Tensor, shape: Shape, rank: Rank) -> bool:
        _, s, h, _ = kernel_dims(shape)
        if basis.dtype != torch.uint8 or tuple(basis.shape) != (self.basis_bytes(shape),):
            return False
        free = int(self.free_columns(Factors((), shape, rank, basis)).sum())
        return free == s * h - rank[0] and abs(int(basis[-1]) - ZERO) <= MOST

    def some_basis(self, shape: Shape, rank: Rank) -> Tensor:
        _, s, h, _ = kernel_dims(shape)
        return _as_bytes(torch.arange(s * h) < rank[0], 0)

    def as_factors(self, tensors: Sequence[Tensor], shape: Shape, rank: Rank) -> Factors:
        first, second = tensors
        rows, last = double(first.flatten(1)).T, double(second)
        chosen, coefficients = basis_of(rows)
        is_free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        is_free[chosen] = False
        kept = torch.einsum("jr,tr...->tj...", rows[chosen], last)
        # With the identity: the other rows may be noise, where as many inputs are dead as the rank leaves out.
        exponent = min(max(round(math.log2(levels([coefficients, kept])[0])), -MOST), MOST)
        size, basis = 2.0**exponent, _as_bytes(~is_free, exponent).to(first.device)
        return Factors(((coefficients[is_free].T * size).to(first), (kept / size).to(second)), shape, rank, basis)

    def tensors_of(self, factors: Factors) -> Sequence[Tensor]:
        others, last = factors.tensors
        (r,) = factors.rank
        assert factors.basis is not None
        is_free, size = self.free_columns(factors), 2.0 ** (factors.basis[-1].to(others.dtype) - ZERO)
        place = torch.where(is_free, r - 1 + is_free.cumsum(0), (~is_free).cumsum(0) - 1)
        unit = torch.eye(r, dtype=others.dtype, device=others.device)
        # Much faster than an index in files of torch.export, which do this at each call.
        first = torch.cat([unit * size, others], 1).gather(1, place.expand(r, -1))
        return [first.reshape(CHAIN.factor_shapes(factors.shape, factors.rank)[0]), last]

    def for_training(self, factors: Factors) -> tuple[Decomposition, Factors]:
        """The factors of `svd`, which are orthogonal: as measured, they learn faster (benchmarks/RESULTS.md)."""
        first, last = map(double, self.tensors_of(factors))
        (left, a), (right, b) = (torch.linalg.qr(x) for x in (first.flatten(1).T, last.movedim(1, -1).flatten(0, -2)))
        u, values, v = torch.linalg.svd(a @ b.T, full_matrices=False)
        rows = (left @ u * values.sqrt()).T
        columns = (right @ v.T * values.sqrt()).reshape(last.movedim(1, -1).shape).movedim(-1, 1)
        found = CHAIN.as_factors([rows.reshape(first.shape), columns], factors.shape, factors.rank)
        return CHAIN, replace(found, tensors=tuple(x.to(factors.tensors[0]) for x in found.tensors))

    def free_columns(self, factors: Factors) -> Tensor:
        assert factors.basis is not None
        _, s, h, _ = kernel_dims(factors.shape)
        # Not by shifts, which ONNX does not have.
        places = 2 ** torch.arange(8, device=factors.basis.device)
        return (factors.basis[:-1, None].long() % (2 * places) < places).flatten()[: s * h]

    def links(self, shape: Shape, rank: Rank) -> tuple[tuple[Shape, str], ...] | None:
        return CHAIN.links(shape, rank)

    def axes(self, shape: Shape) -> Axes:
        return CHAIN.axes(shape)

    def chain_axes(self, shape: Shape) -> tuple[str, ...]:
        return CHAIN.chain_axes(shape)

    def is_matrix_factorisation(self, shape: Shape) -> bool:
        return CHAIN.is_matrix_factorisation(shape)

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        return CHAIN.fit(weight, rank)

    def of_product(self, outputs: Tensor, inputs: Tensor, shape: Shape) -> Sequence[Tensor]:
        return CHAIN.of_product(outputs, inputs, shape)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return CHAIN.unfoldings(weight)

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        return CHAIN.contract(tensors, shape)


def basis_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """R of the rows of a matrix (n × R) in ascending order, and C (n × R): the matrix is C times these rows.

    C holds an identity in these rows, and its other entries are small. The first choice is that of Gaussian elimination
    with row pivoting; then rows are swapped while an entry is large (Goreinov et al., "How to find a good submatrix",
    2010). Rows of zeros, or dependent ones, do no harm.
    """
    n, r = rows.shape
    factored, pivots, _ = torch.linalg.lu_factor_ex(rows)
    order = torch.arange(n)
    for i, j in enumerate((pivots.cpu() - 1).tolist()):
        order[[i, j]] = order[[j, i]]
    order = order.to(rows.device)
    lower = factored.tril(-1)
    lower.diagonal().fill_(1)
    found = torch.empty_like(rows)
    found[order] = torch.linalg.solve_triangular(lower[:r], lower, upper=False, left=False, unitriangular=True)
    chosen = order[:r].clone()
    for _ in range(SWAPS * r):
        largest = int(found.abs().argmax())
        row, column = divmod(largest, r)
        pivot = found[row, column]
        if not abs(float(pivot)) > LARGEST:
            break
        change = found[row].clone()
        change[column] -= 1
        found -= torch.outer(found[:, column] / pivot, change)
        chosen[column] = row
    chosen, places = chosen.sort()
    return chosen, found[:, places]


def _as_bytes(in_basis: Tensor, exponent: int) -> Tensor:
    """The truth values as bytes (uint8), of which the first one is the lowest bit, and the exponent behind them."""
    padded = F.pad(in_basis.to(torch.uint8), (0, -len(in_basis) % 8)).reshape(-1, 8)
    found = (padded << torch.arange(8, dtype=torch.uint8, device=padded.device)).sum(1).to(torch.uint8)
    return torch.cat([found, found.new_tensor([exponent + ZERO])])
