"""Tensor formats: decompositions of a tensor with any modes, and the methods that apply one to a kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
    """A decomposition of a plain tensor with modes `dims`, whatever the modes mean.

    With `spatial`, the last mode holds the H·W kernel positions. Reshaped methods split the channels of a kernel into
    several modes and apply a format to the result.
    """

    pairs_channels: ClassVar[bool]
    """Whether input and output sub-modes are merged pairwise (S_l·T_l) or stay separate modes."""
    is_spectral: ClassVar[bool] = False
    """As `Decomposition.is_spectral`."""

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

    def cuts(self, rank: Rank) -> Rank:
        """As `Decomposition.cuts`."""
        return rank

    def spectra(self, tensor: Tensor, spatial: bool, squares: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """As `Decomposition.spectra`."""
        return [squares(matrix) for matrix in self.unfoldings(tensor, spatial)]

    @abstractmethod
    def axes(self, modes: Sequence[tuple[str, ...]], spatial: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """`Axes.factors`, where each mode of the tensor carries the kernel modes in `modes`."""

    def diagnose(self, tensors: Sequence[Tensor]) -> str | None:
        """A problem of a fit other than its error, in words; None if there is none."""
        return None

    def profiles(self, last: Tensor) -> Tensor:
        """The terms × H·W matrix in the last factor, if that one is spatial. For formats with `pairs_channels`.

        The kernel is a sum over terms. Each term is a map of the channels times one row of the matrix.
        """
        raise NotImplementedError

    def from_profiles(self, profiles: Tensor, rank: Rank) -> Tensor:
        """The inverse of `profiles` at this rank."""
        raise NotImplementedError

    def terms(self, rank: Rank) -> int:
        """The number of rows of `profiles`."""
        return rank[-1]


class Formatted(Decomposition):
    """A method that applies a tensor format to the kernel; `Reshaped` can apply the same format to more modes."""

    solver: str

    @property
    @abstractmethod
    def format(self) -> TensorFormat:
        """The format, with the method's settings."""

    @property
    def is_spectral(self) -> bool:
        return self.format.is_spectral

    def reshaped_course(self) -> Formatted | None:
        """`course` of the reshaped method, before reshaping."""
        course = self.course()
        return course if isinstance(course, Formatted) else None

    def for_shape(self, shape: Shape) -> Decomposition:
        """`svd` for a kernel without spatial extent, because that is a matrix; else the method itself."""
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
