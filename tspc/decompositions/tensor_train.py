"""`tt`: tensor-train decomposition by successive truncated SVDs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tspc.decompositions import oracle
from tspc.decompositions.formats import Formatted, TensorFormat
from tspc.decompositions.kernels import Axes, Rank, Shape, kernel_dims
from tspc.decompositions.linalg import dominant_basis
from tspc.decompositions.registry import register
from tspc.decompositions.settings import require


@dataclass(frozen=True)
class TensorTrainFormat(TensorFormat):
    """A core R_{k-1} × n_k × R_k for every mode, R_0 = R_m = 1 (Oseledets, SIAM J. Sci. Comput. 2011)."""

    solver: str = "native"
    pairs_channels: ClassVar[bool] = True
    is_spectral: ClassVar[bool] = True

    def max_rank(self, dims: Shape, spatial: bool) -> Rank:
        return tuple(min(math.prod(dims[:k]), math.prod(dims[k:])) for k in range(1, len(dims)))

    def is_useful(self, dims: Shape, rank: Rank) -> bool:
        bonds = (1, *rank, 1)
        return all(bonds[k + 1] <= bonds[k] * n and bonds[k] <= n * bonds[k + 1] for k, n in enumerate(dims))

    def factor_shapes(self, dims: Shape, spatial: bool, rank: Rank) -> tuple[Shape, ...]:
        bonds = (1, *rank, 1)
        return tuple((bonds[k], n, bonds[k + 1]) for k, n in enumerate(dims))

    def fit(self, tensor: Tensor, rank: Rank) -> list[Tensor]:
        if self.solver == "tensorly":
            return oracle.tensor_train(tensor, rank)
        dims = tuple(tensor.shape)
        cores = []
        rest, bond = tensor, 1
        for n, r in zip(dims, rank, strict=False):
            matrix = rest.reshape(bond * n, -1)
            basis = dominant_basis(matrix, r)
            rest = basis.T @ matrix
            cores.append(basis.reshape(bond, n, r))
            bond = r
        cores.append(rest.reshape(bond, dims[-1], 1))
        return cores

    def axes(self, modes: Sequence[tuple[str, ...]], spatial: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        return tuple(((), mode, ()) for mode in modes)

    def unfoldings(self, tensor: Tensor, spatial: bool) -> tuple[Tensor, ...]:
        return tuple(tensor.flatten(0, k - 1).flatten(1) for k in range(1, tensor.ndim))

    def profiles(self, last: Tensor) -> Tensor:
        return last[..., 0]

    def from_profiles(self, profiles: Tensor, rank: Rank) -> Tensor:
        return profiles[..., None]

    def contract(self, tensors: Sequence[Tensor]) -> Tensor:
        result = tensors[0]
        for core in tensors[1:]:
            result = torch.tensordot(result, core, dims=1)
        return result.squeeze(0).squeeze(-1)


@register(reshaped={"order": 3})
@dataclass(frozen=True)
class TensorTrain(Formatted):
    """K(s, h, w, t) = Σ A(s, r1) B(r1, h, r2) C(r2, w, r3) D(r3, t); SR1 + R1HR2 + R2WR3 + R3T parameters.

    Chain: 1×1 convolution, H×1, 1×W, 1×1. arXiv:1805.10352, section 3.
    """

    name: ClassVar[str] = "tt"
    solver: str = "native"

    def __post_init__(self) -> None:
        require(self, "solver", oracle.SOLVERS)

    @property
    def format(self) -> TensorTrainFormat:
        return TensorTrainFormat(self.solver)

    def max_rank(self, shape: Shape) -> Rank:
        t, s, h, w = kernel_dims(shape)
        return self.format.max_rank((s, h, w, t), True)

    def is_useful(self, shape: Shape, rank: Rank) -> bool:
        t, s, h, w = kernel_dims(shape)
        return self.format.is_useful((s, h, w, t), rank)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        t, s, h, w = kernel_dims(shape)
        r1, r2, r3 = rank
        return (r1, s, 1, 1), (r2, r1, h, 1), (r3, r2, 1, w), (t, r3, 1, 1)

    def axes(self, shape: Shape) -> Axes:
        t, s, h, w = kernel_dims(shape)
        factors = ((), ("s",), (), ()), ((), (), ("h",), ()), ((), (), (), ("w",)), (("t",), (), (), ())
        return Axes({"t": t}, {"s": s, "h": h, "w": w}, factors)

    def chain_axes(self, shape: Shape) -> tuple[str, ...]:
        return "", "h", "w", ""

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        cores = self.format.fit(weight.permute(1, 2, 3, 0), rank)
        # A core R × n × R' is the weight R' × R × n of a convolution R → R' (the channel cores have n = 1 tap).
        tensors = [cores[0][0].T, *(c.permute(2, 0, 1) for c in cores[1:3]), cores[3][:, :, 0].T]
        return [f.reshape(k) for f, k in zip(tensors, self.factor_shapes(tuple(weight.shape), rank), strict=True)]

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.format.unfoldings(weight.permute(1, 2, 3, 0), True)

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        a, b, c, d = tensors
        return torch.einsum("as,bah,cbw,tc->tshw", a[:, :, 0, 0], b[..., 0], c[:, :, 0], d[:, :, 0, 0])
