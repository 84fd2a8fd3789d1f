"""Tensor formats: decompositions of a tensor with any modes, and the methods that apply one to a kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from tspc.decompositions.base import Decomposition
from tspc.decompositions.kernels import Rank, Shape, is_matrix
from tspc.decompositions.oracle import SOLVERS
from tspc.decompositions.settings import SWEEPS, require
from tspc.decompositions.svd import SVD
from tspc.system.bounds import SHARE


class TensorFormat(ABC):
    """A tensor decomposition of a plain tensor with modes `dims`, apart from any meaning as a kernel.

    With `spatial`, the last mode holds the H·W kernel positions. Reshaped methods apply a format to a
    kernel whose channels were split into several modes.
    """

    pairs_channels: ClassVar[bool]
    """Whether input and output sub-modes are merged pairwise (S_l·T_l) or stay separate modes."""

    @abstractmethod
    def max_rank(self, dims: Shape, spatial: bool) -> Rank: ...

    def is_useful(self, dims: Shape, rank: Rank) -> bool:
        return True

    @abstractmethod
    def factor_shapes(self, dims: Shape, spatial: bool, rank: Rank) -> tuple[Shape, ...]: ...

    @abstractmethod
    def fit(self, tensor: Tensor, rank: Rank) -> list[Tensor]: ...

    @abstractmethod
    def contract(self, tensors: Sequence[Tensor]) -> Tensor: ...

    @abstractmethod
    def unfoldings(self, tensor: Tensor, spatial: bool) -> tuple[Tensor, ...]:
        """As `Decomposition.unfoldings`."""

    @abstractmethod
    def axes(self, modes: Sequence[tuple[str, ...]], spatial: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """`Axes.factors`, where each mode of the tensor carries the kernel modes in `modes`."""

    def diagnose(self, tensors: Sequence[Tensor]) -> str | None:
        """What is wrong with a fit apart from its error, named; None if nothing is."""
        return None

    def profiles(self, last: Tensor) -> Tensor:
        """The terms × H·W matrix in a spatial last factor: the kernel is a sum over the terms of maps of the channels,
        each times one row. For formats with `pairs_channels`."""
        raise NotImplementedError

    def from_profiles(self, profiles: Tensor, rank: Rank) -> Tensor:
        """The inverse of `profiles`, at a rank."""
        raise NotImplementedError

    def terms(self, rank: Rank) -> int:
        """How many rows `profiles` has."""
        return rank[-1]


class Formatted(Decomposition):
    """A method that applies a tensor format to the kernel; `Reshaped` can apply the same format to more modes."""

    solver: str

    @property
    @abstractmethod
    def format(self) -> TensorFormat:
        """The format, with the method's settings."""

    def for_shape(self, shape: Shape) -> Decomposition:
        """A kernel without spatial extent is a matrix, so it is factorised as one."""
        return SVD(self.solver) if is_matrix(shape) else self


@dataclass(frozen=True)
class Swept(Formatted):
    """A formatted method that improves its factors in sweeps.

    There are at most `max_iterations` of them. They end when one lowers the relative error by less than the share
    `tolerance`.
    """

    max_iterations: int = 10
    tolerance: float = 5e-4
    solver: str = "native"

    def __post_init__(self) -> None:
        require(self, "max_iterations", SWEEPS)
        require(self, "tolerance", SHARE)
        require(self, "solver", SOLVERS)

    def sketch(self) -> Self:
        return replace(self, max_iterations=1)
