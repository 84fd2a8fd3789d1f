"""`dense`: the kernel itself as the only factor. It is smaller only with fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tspc.decompositions.base import Decomposition
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, kernel_dims
from tspc.decompositions.metric import Metric
from tspc.errors import DecompositionError


@dataclass(frozen=True)
class Dense(Decomposition):
    """K = K; S·H·W·T parameters, and an empty rank.

    It is not in the registry, because it makes no kernel smaller; a plan uses it with fewer bits.
    """

    name: ClassVar[str] = "dense"

    def max_rank(self, shape: Shape) -> Rank:
        return ()

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        return (shape,)

    def axes(self, shape: Shape) -> Axes:
        t, s, h, w = kernel_dims(shape)
        if len(shape) == 2:
            return Axes({"t": t}, {"s": s}, ((("t",), ("s",)),))
        return Axes({"t": t}, {"s": s, "h": h, "w": w}, ((("t",), ("s",), ("h",), ("w",)),))

    def chain_axes(self, shape: Shape) -> tuple[str, ...]:
        return ("hw",)

    def rank_for(self, shape: Shape, budget: int, multiple: int = 1) -> Rank:
        if self.num_params(shape, ()) > budget:
            raise DecompositionError(f"{self.name}: a kernel of shape {shape} has more than {budget} parameters")
        return ()

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        return (weight.clone(),)

    def decompose(self, weight: Tensor, rank: Rank, metric: Metric | None = None) -> Factors:
        """The kernel itself, which has no error in any norm."""
        return super().decompose(weight, rank)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return ()

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        return tensors[0].reshape(shape)
