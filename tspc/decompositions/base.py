"""What a decomposition is: the contract that every method obeys, and rank selection under a budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tspc.decompositions import function_space
from tspc.decompositions.function_space import Metric
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, check_finite
from tspc.errors import DecompositionError
from tspc.system.modes import own_modes


@dataclass(frozen=True)
class Decomposition(ABC):
    """A way to write a kernel as factors. Its fields are the keys of `conf/method/<name>.yaml`.

    Laws, for every kernel K and rank r (they hold in float64, and are tested over all methods and shapes):

    - `reconstruct(decompose(K, max_rank(K.shape))) == K`;
    - `num_params(K.shape, rank_for(K.shape, budget)) <= budget`, and raising any one entry of that rank
      breaks the budget, or is of no use (`is_useful`);
    - the same arguments give the same factors, bit for bit, on the same machine.

    A float32 kernel is decomposed in float32, and the laws hold to that precision; what conditioning asks for
    is computed in float64 (small normal equations, spectra that reach below float32's noise).
    """

    name: ClassVar[str]

    def for_shape(self, shape: Shape) -> Decomposition:
        """The decomposition that is really used for a kernel of this shape.

        `cp`, `tk` and `tt` of a kernel without spatial extent are a matrix factorisation, so they answer `svd`.
        """
        return self

    def candidates(self, shape: Shape) -> tuple[Decomposition, ...]:
        """The decompositions that may be chosen for a kernel of this shape: one, unless the method is `auto`."""
        return (self.for_shape(shape),)

    def sketch(self) -> Decomposition:
        """A quicker form of the same method, for an error that need not be the least."""
        return self

    @abstractmethod
    def max_rank(self, shape: Shape) -> Rank:
        """The rank from which on every kernel of this shape is represented exactly."""

    @abstractmethod
    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        """Shapes of the factors: the one source of parameter counts."""

    @abstractmethod
    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        """Factors of a finite float32 or float64 kernel at a valid rank."""

    @abstractmethod
    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """The kernel that the factors stand for; differentiable."""

    @abstractmethod
    def axes(self, shape: Shape) -> Axes:
        """Where the kernel's modes are in the factors."""

    def is_matrix_factorisation(self, shape: Shape) -> bool:
        """Whether the kernel has but one input and one output mode, so that the truncated SVD is the optimum."""
        modes = self.axes(shape)
        return math.prod(modes.inputs.values()) == max(modes.inputs.values()) and len(modes.outputs) == 1

    def chain_axes(self, shape: Shape) -> tuple[str, ...] | None:
        """For each factor the spatial axes ("", "h", "w" or "hw") that it convolves over.

        The factors are then, in order, the weights of a chain of ordinary convolutions equal to the layer.
        None where the factors are no such weights.
        """
        return None

    def links(self, shape: Shape, rank: Rank) -> tuple[tuple[Shape, str], ...] | None:
        """The chain of convolutions that equals the layer: for each (out, in of one group, H, W), and its axes.

        By default the factors themselves. None where no chain could cost less than the dense kernel.
        """
        axes = self.chain_axes(shape)
        if axes is None:
            return None
        shapes = [(*s, 1, 1)[:4] for s in self.factor_shapes(shape, rank)]
        return tuple(zip(shapes, axes, strict=True))

    def link_kernels(self, factors: Factors) -> list[Tensor]:
        """The kernels of `links`; differentiable in the factors."""
        return list(factors.tensors)

    def is_useful(self, shape: Shape, rank: Rank) -> bool:
        """Whether no entry of the rank exceeds what its neighbours can carry; a surplus would only hold zeros."""
        return True

    def num_params(self, shape: Shape, rank: Rank) -> int:
        """Number of entries of all factors together."""
        return sum(math.prod(s) for s in self.factor_shapes(shape, rank))

    def min_params(self, shape: Shape, multiple: int = 1) -> int:
        """Number of entries at the smallest rank: 1, or `multiple`."""
        return self.num_params(shape, tuple(min(multiple, top) for top in self.max_rank(shape)))

    def rank_for(self, shape: Shape, budget: int, multiple: int = 1) -> Rank:
        """The largest rank whose factors have at most `budget` entries, its own entries multiples of `multiple`.

        An entry may also be its maximum.

        All entries grow together (each up to its maximum, the rule of arXiv:1805.10352's code), then one
        at a time for as long as one more fits.

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

        low, high = 1, -(-max(top) // multiple)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.num_params(shape, equal(middle)) <= budget else (low, middle - 1)
        rank = equal(low)
        while above := [r for r in self.raised(shape, rank, multiple) if self.num_params(shape, r) <= budget]:
            rank = above[0]
        return rank

    def raised(self, shape: Shape, rank: Rank, multiple: int = 1) -> Iterator[Rank]:
        """The ranks one step above in a single entry, smallest entry first; those of no use are left out."""
        top = self.max_rank(shape)
        for i in sorted(range(len(rank)), key=lambda i: rank[i]):
            if rank[i] < top[i]:
                above = (*rank[:i], min(rank[i] + multiple, top[i]), *rank[i + 1 :])
                if self.is_useful(shape, above):
                    yield above

    @own_modes()
    def decompose(self, weight: Tensor, rank: Rank, metric: Metric | None = None) -> Factors:
        """Factors of `weight`, in its own dtype and on its device; computed in at least float32.

        With `metric` they are fitted in its norm, where their error is never above that of the factors without it.
        Raises DecompositionError for a kernel with NaN or infinite entries, or a rank outside 1…`max_rank`.
        """
        shape = tuple(weight.shape)
        self._check(weight, shape, rank)
        kernel = weight.detach()
        if metric is None:
            tensors = self.fit(kernel if kernel.dtype == torch.float64 else kernel.float(), rank)
        else:
            tensors = function_space.fit(self, kernel, rank, metric)
        return Factors(tuple(t.to(weight).contiguous() for t in tensors), shape, rank)

    @abstractmethod
    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        """For every entry of the rank the matrix whose singular values beyond it are lost."""

    def diagnose(self, factors: Factors) -> str | None:
        """What is wrong with a fit apart from its error, named; None if nothing is."""
        return None

    def reconstruct(self, factors: Factors) -> Tensor:
        """The dense kernel that the factors stand for; differentiable in them."""
        return self.contract(factors.tensors, factors.shape)

    def _check(self, weight: Tensor, shape: Shape, rank: Rank) -> None:
        top = self.max_rank(shape)
        if len(rank) != len(top) or any(not 1 <= r <= limit for r, limit in zip(rank, top, strict=True)):
            raise DecompositionError(
                f"rank {rank} does not fit {self.name} of a kernel of shape {shape}: "
                f"it has {len(top)} entries, from 1 up to {top}"
            )
        if not self.is_useful(shape, rank):
            raise DecompositionError(
                f"rank {rank} of {self.name}: one entry exceeds what the others can carry; lower it"
            )
        check_finite(weight)

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data; `decompositions.from_dict` reads it back."""
        return {"name": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}
