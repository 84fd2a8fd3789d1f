"""`cp`: canonical polyadic decomposition by alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tspc.decompositions.base import Axes, Decomposition, Rank, Shape, TensorFormat, is_matrix, kernel_dims
from tspc.decompositions.linalg import dominant_basis, truncated_svd
from tspc.decompositions.svd import SVD

RIDGE = 1e-9
"""Relative ridge of the normal equations: keeps nearly collinear components solvable."""


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product: matrices n_i × R give ∏n_i × R, the first index slowest."""
    result = matrices[0]
    for matrix in matrices[1:]:
        result = (result[:, None, :] * matrix[None, :, :]).reshape(-1, result.shape[1])
    return result


@dataclass(frozen=True)
class CPFormat(TensorFormat):
    """X = Σ_r a_r ∘ b_r ∘ … : one n_i × R matrix a mode (Kolda & Bader, SIAM Review 2009, section 3)."""

    max_iterations: int
    tolerance: float
    seed: int
    pairs_channels: ClassVar[bool] = True

    def max_rank(self, dims: Shape, spatial: bool) -> Rank:
        # Writing out all but the largest mode in unit vectors is exact; fewer terms need not be.
        return (math.prod(dims) // max(dims),)

    def factor_shapes(self, dims: Shape, spatial: bool, rank: Rank) -> tuple[Shape, ...]:
        return tuple((n, rank[0]) for n in dims)

    def fit(self, tensor: Tensor, rank: Rank) -> list[Tensor]:
        (r,) = rank
        if rank == self.max_rank(tuple(tensor.shape), False):
            return _exact(tensor)
        if tensor.ndim == 2:
            left, right = truncated_svd(tensor, r)
            return [left, right.T]
        # The largest mode goes last, where `_sweep` contracts it first: what is left is then smallest.
        order = sorted(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
        factors = self._als(tensor.permute(order).contiguous(), r)
        return _balance([factors[order.index(mode)] for mode in range(tensor.ndim)])

    def axes(self, modes: Sequence[tuple[str, ...]], spatial: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        return tuple((mode, ()) for mode in modes)

    def contract(self, tensors: Sequence[Tensor]) -> Tensor:
        *rows, last = tensors
        return (khatri_rao(rows) @ last.T).reshape([f.shape[0] for f in tensors])

    def _als(self, tensor: Tensor, r: int) -> list[Tensor]:
        """Sweeps over the modes until the error stops falling, at most `max_iterations` times."""
        factors = self._initial(tensor, r)
        flat = tensor.reshape(-1, tensor.shape[-1])
        norm2 = float((tensor * tensor).sum())
        best, best_error = factors, math.inf
        for _ in range(self.max_iterations):
            factors, error2 = _sweep(tensor, flat, norm2, factors)
            error = math.sqrt(max(error2, 0.0) / norm2) if norm2 > 0 else 0.0
            if not math.isfinite(error) or error > best_error - self.tolerance * max(best_error, 1e-12):
                return factors if error < best_error else best
            best, best_error = factors, error
        return best

    def _initial(self, tensor: Tensor, r: int) -> list[Tensor]:
        """Dominant subspaces where they reach, seeded Gaussian columns beyond them."""
        generator = torch.Generator().manual_seed(self.seed)
        factors = []
        for mode, n in enumerate(tensor.shape):
            unfolding = tensor.movedim(mode, 0).reshape(n, -1)
            basis = dominant_basis(unfolding, min(r, *unfolding.shape))
            noise = torch.randn(n, r - basis.shape[1], generator=generator, dtype=tensor.dtype) / math.sqrt(n)
            factors.append(torch.cat([basis, noise.to(tensor.device)], dim=1))
        return factors


def _sweep(tensor: Tensor, flat: Tensor, norm2: float, factors: list[Tensor]) -> tuple[list[Tensor], float]:
    """One pass over all modes; returns the new factors and the squared error, without a reconstruction.

    All modes but the last share one contraction of the tensor with the last factor (a dimension tree of
    depth two; Phan, Tichavský & Cichocki, IEEE TSP 2013), so that a sweep reads the tensor twice.
    """
    r = factors[0].shape[1]
    factors = list(factors)
    grams = [f.T @ f for f in factors]
    partial = (flat @ factors[-1]).reshape(*tensor.shape[:-1], r)
    for mode in range(tensor.ndim - 1):
        product = partial
        for other in reversed([m for m in range(tensor.ndim - 1) if m != mode]):
            axis = other if other < mode else other - (mode < other) + 1
            product = (product.movedim(axis, -2) * factors[other]).sum(-2)
        factors[mode], grams[mode] = _solve(product, grams, mode)
    product = flat.T @ khatri_rao(factors[:-1])
    factors[-1], grams[-1] = _solve(product, grams, tensor.ndim - 1)
    inner = (product * factors[-1]).sum()
    energy = torch.stack(grams).prod(0).sum()
    return factors, float(norm2 - 2 * inner + energy)


def _solve(product: Tensor, grams: list[Tensor], mode: int) -> tuple[Tensor, Tensor]:
    """The least-squares factor of one mode and its Gram matrix."""
    system = torch.stack([g for m, g in enumerate(grams) if m != mode]).prod(0)
    ridge = RIDGE * system.diagonal().mean() + torch.finfo(system.dtype).tiny
    system = system + ridge * torch.eye(len(system), dtype=system.dtype, device=system.device)
    factor = torch.linalg.solve(system, product.T).T
    return factor, factor.T @ factor


def _balance(factors: list[Tensor]) -> list[Tensor]:
    """Gives every component the same norm in all modes."""
    norms = torch.stack([torch.linalg.vector_norm(f, dim=0) for f in factors])
    size = norms.prod(0) ** (1 / len(factors))
    return [f * torch.where(n > 0, size / n, 0.0) for f, n in zip(factors, norms, strict=True)]


def _exact(tensor: Tensor) -> list[Tensor]:
    """Unit vectors in all modes but the largest, whose factor holds the fibres: exact at the maximal rank."""
    largest = max(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
    others = [n for mode, n in enumerate(tensor.shape) if mode != largest]
    index = torch.cartesian_prod(*(torch.arange(n) for n in others)).reshape(-1, len(others)).T.to(tensor.device)
    factors = [torch.nn.functional.one_hot(i, n).T.to(tensor.dtype) for i, n in zip(index, others, strict=True)]
    factors.insert(largest, tensor.movedim(largest, 0).reshape(tensor.shape[largest], -1))
    return _balance(factors)


@dataclass(frozen=True)
class CP(Decomposition):
    """K(s, h, w, t) = Σ_r A(s, r) B(hw, r) C(t, r); R(S + HW + T) parameters.

    Chain: 1×1 convolution S → R, depthwise H×W, 1×1 convolution R → T. Lebedev et al., ICLR 2015
    (with the two spatial modes as one); arXiv:1805.10352, section 3.
    """

    name: ClassVar[str] = "cp"
    max_iterations: int = 50
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        self._require(self.max_iterations >= 1, "max_iterations", "at least 1")
        self._require(0 <= self.tolerance < math.inf, "tolerance", "at least 0")

    @property
    def format(self) -> CPFormat:
        return CPFormat(self.max_iterations, self.tolerance, self.seed)

    def for_shape(self, shape: Shape) -> Decomposition:
        return SVD() if is_matrix(shape) else self

    def max_rank(self, shape: Shape) -> Rank:
        t, s, h, w = kernel_dims(shape)
        return self.format.max_rank((s, h * w, t), True)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        t, s, h, w = kernel_dims(shape)
        (r,) = rank
        return (r, s, 1, 1), (r, 1, h, w), (t, r, 1, 1)

    def axes(self, shape: Shape) -> Axes:
        t, s, h, w = kernel_dims(shape)
        inputs, space, outputs = ((), ("s",), (), ()), ((), (), ("h",), ("w",)), (("t",), (), (), ())
        return Axes({"t": t}, {"s": s, "h": h, "w": w}, (inputs, space, outputs))

    def chain_axes(self, shape: Shape) -> tuple[str, ...]:
        return "", "hw", ""

    def _fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        shape = tuple(weight.shape)
        t, s, h, w = kernel_dims(shape)
        inputs, space, outputs = self.format.fit(weight.permute(1, 2, 3, 0).reshape(s, h * w, t), rank)
        tensors = inputs.T, space.T, outputs
        return [f.reshape(k) for f, k in zip(tensors, self.factor_shapes(shape, rank), strict=True)]

    def _contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        inputs, space, outputs = tensors
        return torch.einsum("rs,rhw,tr->tshw", inputs[:, :, 0, 0], space[:, 0], outputs[:, :, 0, 0])
