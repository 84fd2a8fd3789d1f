"""The contract of every decomposition, and rank selection under a budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tspc.decompositions import function_space
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, check_finite, levels
from tspc.decompositions.linalg import squared_singular_values
from tspc.decompositions.metric import Metric
from tspc.errors import DecompositionError
from tspc.system.modes import own_modes


@dataclass(frozen=True)
class Decomposition(ABC):
    """A way to write a kernel as factors. Its fields are the keys of `conf/method/<name>.yaml`.

    Laws for every kernel K and rank r (they hold in float64, and are tested for all methods):

    - `reconstruct(decompose(K, max_rank(K.shape))) == K`;
    - `num_params(K.shape, rank_for(K.shape, budget)) <= budget`, and a higher value of any single entry of that rank
      exceeds the budget, or is useless (`is_useful`);
    - the same arguments give the same factors, bit for bit, on the same machine;
    - `contract` is linear in each tensor that it takes; the terms of a sum are stacked in one tensor. These tensors are
      the factors, or for `id` they follow from the factors (`tensors_of`).

    A float32 kernel is decomposed in float32, and the laws hold to that precision. Badly conditioned parts are
    computed in float64: small normal equations, and spectra that reach below the noise of float32.
    """

    name: ClassVar[str]

    def for_shape(self, shape: Shape) -> Decomposition:
        """The decomposition that is actually used for a kernel of this shape.

        A kernel without spatial extent is a matrix, so `cp`, `tk`, `tt` and `tr` return `svd`.
        """
        return self

    def candidates(self, shape: Shape) -> tuple[Decomposition, ...]:
        """The candidates for a kernel of this shape. It is one decomposition, except for `auto`."""
        return (self.for_shape(shape),)

    def sketch(self) -> Decomposition:
        """A faster form of the same method, which finds an approximate error."""
        return self

    @abstractmethod
    def max_rank(self, shape: Shape) -> Rank:
        """The rank at which every kernel of this shape is represented exactly."""

    @abstractmethod
    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        """Shapes of the factors. All counts of parameters come from here."""

    @abstractmethod
    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        """What `contract` takes, in the kernel's dtype. It is float32 or float64 and finite; the rank is valid."""

    @abstractmethod
    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """The kernel of this shape that the factors represent; differentiable in them."""

    @abstractmethod
    def axes(self, shape: Shape) -> Axes:
        """The position of the kernel's modes in the tensors that `contract` takes."""

    def as_factors(self, tensors: Sequence[Tensor], shape: Shape, rank: Rank) -> Factors:
        """The factors that stand for what `fit` found. By default these are the tensors, with entries of one size."""
        level = zip(tensors, levels(tensors), strict=True)
        return Factors(tuple(t * scale for t, scale in level), shape, rank)

    def tensors_of(self, factors: Factors) -> Sequence[Tensor]:
        """What `contract` takes, from the factors; differentiable in them. By default the factors themselves."""
        return factors.tensors

    def for_training(self, factors: Factors) -> tuple[Decomposition, Factors]:
        """Method and factors of the same kernel and rank, in which a training goes best; by default its own."""
        return self, factors

    def free_columns(self, factors: Factors) -> Tensor | None:
        """Of the first of `tensors_of` as a matrix the columns (truth values) that are entries of a factor; None: all.

        The other columns are constants.
        """
        return None

    @property
    def has_basis(self) -> bool:
        """Whether the factors are not all: there is a `Factors.basis`, and `tensors_of` needs it."""
        return False

    def basis_bytes(self, shape: Shape) -> int:
        """The size of `Factors.basis`; 0 if the method has none."""
        return 0

    def is_basis(self, basis: Tensor, shape: Shape, rank: Rank) -> bool:
        """Whether these bytes can be the `Factors.basis` of a kernel; for a method that has one."""
        return False

    def some_basis(self, shape: Shape, rank: Rank) -> Tensor | None:
        """A valid `Factors.basis`, for layers that get their factors later."""
        return None

    def is_matrix_factorisation(self, shape: Shape) -> bool:
        """Whether the factors are an n × R and an R × T matrix. The truncated SVD is then the optimum."""
        rank = tuple(1 for _ in self.max_rank(shape))
        factors = [math.prod(factor) for factor in self.factor_shapes(shape, rank)]
        return len(rank) == 1 and factors == [math.prod(shape[1:]), shape[0]] and len(self.axes(shape).outputs) == 1

    def of_product(self, outputs: Tensor, inputs: Tensor, shape: Shape) -> Sequence[Tensor]:
        """The factors of the kernel `outputs @ inputs` (T × R times R × n), for a matrix factorisation."""
        return self.fit((outputs @ inputs).reshape(shape), (len(inputs),))

    def chain_axes(self, shape: Shape) -> tuple[str, ...] | None:
        """For each tensor that `contract` takes the spatial axes over which it convolves: "", "h", "w" or "hw".

        The tensors are then the weights of a chain of ordinary convolutions, in this order, and the chain equals the
        layer. None if the tensors are not such weights.
        """
        return None

    def links(self, shape: Shape, rank: Rank) -> tuple[tuple[Shape, str], ...] | None:
        """The chain that equals the layer. Each link is a shape (out, in of one group, H, W) and its spatial axes.

        By default they are what `contract` takes. None if no chain could cost less than the dense kernel.
        """
        axes = self.chain_axes(shape)
        if axes is None:
            return None
        shapes = [(*s, 1, 1)[:4] for s in self.factor_shapes(shape, rank)]
        return tuple(zip(shapes, axes, strict=True))

    def link_kernels(self, factors: Factors) -> list[Tensor]:
        """The kernels of `links`; differentiable in the factors."""
        return list(self.tensors_of(factors))

    def is_useful(self, shape: Shape, rank: Rank) -> bool:
        """Whether every entry of the rank can be filled, given the other entries; a surplus would only hold zeros."""
        return True

    def num_params(self, shape: Shape, rank: Rank) -> int:
        """Number of entries in all factors. Of a basis 32 bits count as an entry."""
        return sum(math.prod(s) for s in self.factor_shapes(shape, rank)) + -(-self.basis_bytes(shape) // 4)

    def min_params(self, shape: Shape, multiple: int = 1) -> int:
        """Number of entries in all factors at the smallest rank, which is 1 or `multiple`."""
        return self.num_params(shape, tuple(min(multiple, top) for top in self.max_rank(shape)))

    def rank_for(self, shape: Shape, budget: int, multiple: int = 1) -> Rank:
        """The largest rank at which the factors have at most `budget` entries.

        Each entry of the rank is a multiple of `multiple`, or its maximum. First all entries grow together, each up to
        its maximum (the rule of the code of arXiv:1805.10352). Then one entry grows at a time, while one more fits.

        Raises DecompositionError if even the smallest rank exceeds the budget.
        """
        top = self.max_rank(shape)
        minimum = self.min_params(shape, multiple)
        if minimum > budget:
            raise DecompositionError(
                f"{self.name} of a kernel of shape {shape} needs at least {minimum} parameters, "
                f"but the budget is {budget}; raise the rate or keep the layer dense"
            )

        def equal(count: int) -> Rank:
            return tuple(min(count * multiple, limit) for limit in top)

        def fits(rank: Rank) -> bool:
            return self.num_params(shape, rank) <= budget

        low, high = 1, -(-max(top) // multiple)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(equal(middle)) else (low, middle - 1)
        rank = equal(low)
        while above := next((r for r in self.raised(shape, rank, multiple) if fits(r)), None):
            rank = above
        return rank

    def raised(self, shape: Shape, rank: Rank, multiple: int = 1) -> Iterator[Rank]:
        """The ranks that are one step higher in a single entry, smallest entry first, without useless ones."""
        top = self.max_rank(shape)
        for i in sorted(range(len(rank)), key=lambda i: rank[i]):
            if rank[i] < top[i]:
                above = (*rank[:i], min(rank[i] + multiple, top[i]), *rank[i + 1 :])
                if self.is_useful(shape, above):
                    yield above

    @own_modes()
    def decompose(self, weight: Tensor, rank: Rank, metric: Metric | None = None) -> Factors:
        """Factors of `weight`, in its dtype and on its device; computed at least in float32.

        With `metric` the factors are fitted in its norm. In that norm their error is at most the error of the factors
        without `metric`. Raises DecompositionError for a kernel with NaN or infinite entries, or a rank outside
        1…`max_rank`.
        """
        shape = tuple(weight.shape)
        self._check(weight, shape, rank)
        kernel = weight.detach()
        if metric is None:
            tensors = self.fit(kernel if kernel.dtype == torch.float64 else kernel.float(), rank)
        else:
            tensors = function_space.fit(self, kernel, rank, metric)
        found = self.as_factors(tensors, shape, rank)
        return replace(found, tensors=tuple(t.to(weight).contiguous() for t in found.tensors))

    @property
    def is_spectral(self) -> bool:
        """Whether the squared error is about the sum of the squared singular values that `unfoldings` lose."""
        return False

    @abstractmethod
    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        """For every entry of the rank a matrix: the decomposition loses its singular values beyond `cuts`."""

    def cuts(self, rank: Rank) -> Rank:
        """How many singular values of each of `unfoldings` a decomposition of this rank can keep."""
        return rank

    def course(self) -> Decomposition | None:
        """The method whose spectra show how this method's error falls with its size; None if there is none.

        Another method has about the same error at the same size, up to a factor. If it is the method itself, but not
        `is_spectral`, then `spectra` are those of an approximation from which the fit starts.
        """
        return self if self.is_spectral else None

    def spectra(self, weight: Tensor, squares: Callable[[Tensor], Tensor] = squared_singular_values) -> list[Tensor]:
        """For each entry of the rank the squares of the singular values that it cuts, largest first.

        `squares` gives those of a matrix.
        """
        return [squares(matrix) for matrix in self.unfoldings(weight)]

    def diagnose(self, factors: Factors) -> str | None:
        """A problem of a fit other than its error, in words; None if there is none."""
        return None

    def reconstruct(self, factors: Factors) -> Tensor:
        """The dense kernel that the factors represent; differentiable in them."""
        return self.contract(self.tensors_of(factors), factors.shape)

    def _check(self, weight: Tensor, shape: Shape, rank: Rank) -> None:
        top = self.max_rank(shape)
        if len(rank) != len(top) or any(not 1 <= r <= limit for r, limit in zip(rank, top, strict=True)):
            raise DecompositionError(
                f"rank {rank} does not fit {self.name} of a kernel of shape {shape}: "
                f"it has {len(top)} entries, from 1 up to {top}"
            )
        if not self.is_useful(shape, rank):
            raise DecompositionError(f"rank {rank} of {self.name}: one entry is too large for the others; lower it")
        check_finite(weight)

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data; `decompositions.from_dict` reads it back."""
        return {"name": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}
