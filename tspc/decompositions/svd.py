"""`svd`: the kernel as one matrix, which gives a vertical and a horizontal convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tspc.decompositions import oracle
from tspc.decompositions.base import Decomposition
from tspc.decompositions.kernels import Axes, Rank, Shape, kernel_dims
from tspc.decompositions.linalg import truncated_svd
from tspc.decompositions.registry import register
from tspc.decompositions.settings import require


@register()
@dataclass(frozen=True)
class SVD(Decomposition):
    """K(s, h, w, t) = Σ_r A(s, h, r) B(r, w, t); R(SH + WT) parameters.

    Chain: H×1 convolution S → R, then 1×W convolution R → T. Jaderberg et al., BMVC 2014 (scheme 2);
    arXiv:1805.10352, section 3.
    """

    name: ClassVar[str] = "svd"
    solver: str = "native"

    def __post_init__(self) -> None:
        require(self, "solver", oracle.SOLVERS)

    @property
    def is_spectral(self) -> bool:
        return True

    def max_rank(self, shape: Shape) -> Rank:
        t, s, h, w = kernel_dims(shape)
        return (min(s * h, w * t),)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        t, s, h, w = kernel_dims(shape)
        (r,) = rank
        return ((r, s), (t, r)) if len(shape) == 2 else ((r, s, h, 1), (t, r, 1, w))

    def axes(self, shape: Shape) -> Axes:
        t, s, h, w = kernel_dims(shape)
        if len(shape) == 2:
            return Axes({"t": t}, {"s": s}, (((), ("s",)), (("t",), ())))
        first, second = ((), ("s",), ("h",), ()), (("t",), (), (), ("w",))
        return Axes({"t": t}, {"s": s, "h": h, "w": w}, (first, second))

    def chain_axes(self, shape: Shape) -> tuple[str, ...]:
        *_, h, w = kernel_dims(shape)
        # The first convolution of a strided 1×1 kernel takes the whole stride, so the second sees fewer positions.
        return ("hw", "") if h * w == 1 else ("h", "w")

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        shape = tuple(weight.shape)
        t, _, _, w = kernel_dims(shape)
        (r,) = rank
        (matrix,) = self.unfoldings(weight)
        solve = oracle.svd if self.solver == "tensorly" else truncated_svd
        left, right = solve(matrix, r)
        first = left.T
        second = right.reshape(r, w, t).permute(2, 0, 1)
        return [f.reshape(k) for f, k in zip((first, second), self.factor_shapes(shape, rank), strict=True)]

    def of_product(self, outputs: Tensor, inputs: Tensor, shape: Shape) -> Sequence[Tensor]:
        shapes = self.factor_shapes(shape, (len(inputs),))
        return [f.reshape(k) for f, k in zip((inputs, outputs), shapes, strict=True)]

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        t, s, h, w = kernel_dims(tuple(weight.shape))
        return (weight.reshape(t, s, h, w).permute(1, 2, 3, 0).reshape(s * h, w * t),)

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        first, second = tensors
        if len(shape) == 2:
            return second @ first
        return torch.einsum("rsh,trw->tshw", first.squeeze(3), second.squeeze(2))
