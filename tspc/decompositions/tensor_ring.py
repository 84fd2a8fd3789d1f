"""`tr`: tensor-ring decomposition by a truncated SVD at every bond, then alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tspc.decompositions import oracle
from tspc.decompositions.formats import Swept, TensorFormat
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, kernel_dims
from tspc.decompositions.linalg import dominant_basis
from tspc.decompositions.registry import register
from tspc.decompositions.ring_als import alternate, balanced, contracted
from tspc.decompositions.tensor_train import TensorTrain
from tspc.decompositions.tucker import Tucker


@dataclass(frozen=True)
class TensorRingFormat(TensorFormat):
    """A core R_{k-1} × n_k × R_k for every mode; the last bond R_m is the first one, R_0.

    The rank is (R_0, …, R_{m-1}). With R_0 = 1 the ring is a tensor train. TR-SVD gives the start, TR-ALS the sweeps
    (Zhao, Zhou, Xie, Zhang & Cichocki, "Tensor ring decomposition", arXiv:1606.05535).
    """

    max_iterations: int
    tolerance: float
    solver: str = "native"
    pairs_channels: ClassVar[bool] = True

    def max_rank(self, dims: Shape, spatial: bool) -> Rank:
        whole = min(dims[0], math.prod(dims[1:]))  # the least R_0·R_1 that is exact
        first = math.isqrt(whole)
        bonds = [first, -(-whole // first)]
        for k in range(1, len(dims) - 1):
            bonds.append(min(bonds[k] * dims[k], math.prod(dims[k + 1 :]) * first))
        return tuple(bonds)

    def is_useful(self, dims: Shape, rank: Rank) -> bool:
        bonds = (*rank, rank[0])
        return all(bonds[k + 1] <= bonds[k] * n and bonds[k] <= n * bonds[k + 1] for k, n in enumerate(dims))

    def factor_shapes(self, dims: Shape, spatial: bool, rank: Rank) -> tuple[Shape, ...]:
        bonds = (*rank, rank[0])
        return tuple((bonds[k], n, bonds[k + 1]) for k, n in enumerate(dims))

    def fit(self, tensor: Tensor, rank: Rank) -> list[Tensor]:
        if self.solver == "tensorly":
            return oracle.tensor_ring(tensor, rank)
        return balanced(alternate(tensor, _by_svd(tensor, rank), self.max_iterations, self.tolerance))

    def axes(self, modes: Sequence[tuple[str, ...]], spatial: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        return tuple(((), mode, ()) for mode in modes)

    def unfoldings(self, tensor: Tensor, spatial: bool) -> tuple[Tensor, ...]:
        # An unfolding cuts a ring at two bonds, so the first bond appears together with the second.
        cut = [tensor.flatten(0, k - 1).flatten(1) for k in range(1, tensor.ndim)]
        return cut[0], *cut

    def cuts(self, rank: Rank) -> Rank:
        first, *others = rank
        return first * others[0], *(first * bond for bond in others)

    def contract(self, tensors: Sequence[Tensor]) -> Tensor:
        return contracted(tensors)

    def terms(self, rank: Rank) -> int:
        return rank[-1] * rank[0]

    def profiles(self, last: Tensor) -> Tensor:
        return last.transpose(1, 2).flatten(0, 1)

    def from_profiles(self, profiles: Tensor, rank: Rank) -> Tensor:
        return profiles.reshape(rank[-1], rank[0], -1).transpose(1, 2)


def _by_svd(tensor: Tensor, rank: Rank) -> list[Tensor]:
    """TR-SVD: the first unfolding is truncated at R_0·R_1. The rest is a tensor train with R_0 as its last mode."""
    first, *others = tensor.shape
    start, bond = rank[:2]
    matrix = tensor.reshape(first, -1)
    known = min(start * bond, *matrix.shape)
    basis = matrix.new_zeros(first, start * bond)
    basis[:, :known] = dominant_basis(matrix, known)
    cores = [basis.reshape(first, start, bond).transpose(0, 1)]
    rest = (basis.T @ matrix).reshape(start, -1).T
    for n, following in zip(others[:-1], rank[2:], strict=True):
        matrix = rest.reshape(bond * n, -1)
        basis = dominant_basis(matrix, following)
        cores.append(basis.reshape(bond, n, following))
        rest, bond = basis.T @ matrix, following
    return [*cores, rest.reshape(bond, others[-1], start)]


@register(reshaped={"order": 3})
@dataclass(frozen=True)
class TensorRing(Swept):
    """K(s, h, w, t) = Σ A(r0, s, r1) B(r1, h, r2) C(r2, w, r3) D(r3, t, r0); SR0R1 + HR1R2 + WR2R3 + TR3R0 parameters.

    Chain: 1×1 convolution S → R0·R1, then H×1 and 1×W convolutions of R0 groups that share their kernels, 1×1
    convolution R0·R3 → T. Wang, Sun, Eriksson, Wang & Aggarwal, "Wide compression: tensor ring nets", CVPR 2018.
    """

    name: ClassVar[str] = "tr"
    max_iterations: int = 7

    @property
    def format(self) -> TensorRingFormat:
        return TensorRingFormat(self.max_iterations, self.tolerance, self.solver)

    def max_rank(self, shape: Shape) -> Rank:
        return self.format.max_rank(_modes(shape), True)

    def is_useful(self, shape: Shape, rank: Rank) -> bool:
        return self.format.is_useful(_modes(shape), rank)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        return self.format.factor_shapes(_modes(shape), True, rank)

    def axes(self, shape: Shape) -> Axes:
        s, h, w, t = _modes(shape)
        factors = self.format.axes([("s",), ("h",), ("w",), ("t",)], True)
        return Axes({"t": t}, {"s": s, "h": h, "w": w}, factors)

    def links(self, shape: Shape, rank: Rank) -> tuple[tuple[Shape, str], ...]:
        s, h, w, t = _modes(shape)
        r0, r1, r2, r3 = rank
        kernels = (r0 * r1, s, 1, 1), (r0 * r2, r1, h, 1), (r0 * r3, r2, 1, w), (t, r0 * r3, 1, 1)
        return tuple(zip(kernels, ("", "h", "w", ""), strict=True))

    def link_kernels(self, factors: Factors) -> list[Tensor]:
        first, down, across, last = factors.tensors
        groups = len(first)
        return [
            first.transpose(1, 2).flatten(0, 1)[..., None, None],
            down.permute(2, 0, 1)[..., None].repeat(groups, 1, 1, 1),
            across.permute(2, 0, 1)[:, :, None].repeat(groups, 1, 1, 1),
            last.permute(1, 2, 0).flatten(1)[..., None, None],
        ]

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        return self.format.fit(weight.permute(1, 2, 3, 0), rank)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.format.unfoldings(weight.permute(1, 2, 3, 0), True)

    def cuts(self, rank: Rank) -> Rank:
        return self.format.cuts(rank)

    def course(self) -> Tucker:
        # The spectra of a ring itself bound its error from below only, and end early.
        return Tucker()

    def reshaped_course(self) -> TensorTrain:
        return TensorTrain()

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        return self.format.contract(tensors).permute(3, 0, 1, 2)


def _modes(shape: Shape) -> Shape:
    """The kernel's modes in the order of the ring: S, H, W, T."""
    t, s, h, w = kernel_dims(shape)
    return s, h, w, t
