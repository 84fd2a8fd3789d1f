"""Decomposition in function space: the error of a layer's output instead of the error of its kernel.

Take the kernel as a T × (S·H·W) matrix. For input patches x the mean squared error of the output is
E‖(K − K̂)x‖² = ‖(K − K̂)Σ^½‖² with Σ = E[xxᵀ]. Three steps, the same for every method, make it small:

1. whiten: Σ is close to a Kronecker product over the kernel's modes. Every mode is multiplied by a root of its
   marginal covariance, and the ordinary method decomposes the whitened kernel;
2. refine: Levenberg-Marquardt changes all factors together in the exact norm. Conjugate gradients solve the linear
   systems (Tichavský, Phan & Cichocki, "Krylov-Levenberg-Marquardt algorithm for structured Tucker tensor
   decompositions", IEEE JSTSP 2021). A method is multilinear in its factors, so this needs `contract` only;
3. un-whiten: the factors' modes are multiplied by the inverse roots.

For a matrix the whitened truncated SVD is already the optimum, and nothing is refined.

The factors span few of the directions of the input and output channels. For large kernels, refining stays in these and
the directions into which the first step would go. The norm is projected on them first, which makes it many times
smaller (as CANDELINC does for the plain norm: Carroll, Pruzansky & Kruskal, Psychometrika 1980).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tspc.decompositions.kernels import Axes, Rank, Shape
from tspc.decompositions.linalg import eigenvalues, eigenvectors, squared_singular_values
from tspc.decompositions.metric import Metric, Roots, Rows
from tspc.decompositions.mode_products import on_factors
from tspc.decompositions.refinement import INNER, STALLED, refine

FULL, SKETCH = (12, 6e10, STALLED), (3, 1.5e10, 0.3)
"""The largest number of Levenberg-Marquardt steps, and of their multiply-adds with the metric. Refining ends when the
squared error falls by less than the last of the numbers; most sketches need one step."""
WIDEST = 4096
"""With more inputs than this in the subspace, a norm that is given by rows is not refined in."""
MORE, WORTHWHILE, SMALL = 1.5, 0.8, 1e8
"""A subspace has so many times the directions of the factors. It is used if these are at most this share of all, and a
product with the whole norm takes more than so many multiply-adds."""


class Multilinear(Protocol):
    """What this module needs of a method: a plain fit, and a contraction that is linear in each factor."""

    def axes(self, shape: Shape) -> Axes: ...

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]: ...

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor: ...

    def is_matrix_factorisation(self, shape: Shape) -> bool: ...

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]: ...

    def spectra(self, weight: Tensor, squares: Callable[[Tensor], Tensor]) -> list[Tensor]: ...

    def of_product(self, outputs: Tensor, inputs: Tensor, shape: Shape) -> Sequence[Tensor]: ...


def fit(method: Multilinear, weight: Tensor, rank: Rank, metric: Metric) -> list[Tensor]:
    """Factors of a finite kernel (float32 or float64), in its precision, with a small error in the norm `metric`.

    The error is at most the error of the plain fit. A sketch does not compare with the plain fit.
    """
    shape = tuple(weight.shape)
    if method.is_matrix_factorisation(shape):
        return _optimum(method, weight, rank[0], metric)
    axes = method.axes(shape)
    roots = metric.roots(axes)
    if weight.dtype == torch.float32:
        metric = metric.single()
    start = list(method.fit(roots.whiten(weight), rank))

    problem = _Problem(method, shape, axes, roots, metric)
    state = problem.state(start, weight)
    if not metric.is_sketch:
        plain = problem.state(roots.whiten_factors(method.fit(weight, rank), axes), weight)
        state = plain if plain.squared < state.squared else state
    return roots.unwhiten_factors(problem.refined(state, weight), axes)


def _optimum(method: Multilinear, weight: Tensor, rank: int, metric: Metric) -> list[Tensor]:
    """The best factors of a matrix (T × n): the projection of G^½WΣ^½ on its largest left or right singular vectors.

    Only the smaller of the two sides is factored, and of its Gram matrix only the leading eigenvectors are needed.
    """
    matrix = weight.flatten(1).to(metric.inputs.dtype)
    basis, _ = eigenvectors(_gram(matrix, metric), rank)
    if _is_left(matrix, metric):
        outputs, inputs = metric.unscaled(basis), metric.scaled(basis).mT @ matrix
    else:
        root = metric.input_root
        outputs = matrix @ (root @ basis)
        inputs = torch.linalg.solve_triangular(root.mT, basis, upper=True).mT
    sizes = (torch.linalg.vector_norm(outputs, dim=0) / torch.linalg.vector_norm(inputs, dim=1)).sqrt()
    sizes = torch.where((sizes > 0) & sizes.isfinite(), sizes, 1.0)
    found = method.of_product(outputs / sizes, inputs * sizes[:, None], tuple(weight.shape))
    return [tensor.to(weight) for tensor in found]


def _is_left(matrix: Tensor, metric: Metric) -> bool:
    """Whether the outputs are the smaller side; the side of the inputs needs Σ itself."""
    return len(matrix) <= matrix.shape[1] or isinstance(metric.inputs, Rows)


def _gram(matrix: Tensor, metric: Metric) -> Tensor:
    """The Gram matrix of the smaller side of G^½WΣ^½, up to a rotation."""
    if _is_left(matrix, metric):
        gram = metric.scaled(metric.scaled(metric.after(matrix) @ matrix.mT, transposed=True).mT, transposed=True)
    else:
        half = matrix @ metric.input_root
        gram = half.mT @ metric.weighted(half)
    return (gram + gram.mT) / 2


def spectra(
    method: Multilinear,
    weight: Tensor,
    metric: Metric | None,
    squares: Callable[[Tensor], Tensor] = squared_singular_values,
) -> list[Tensor]:
    """`Decomposition.spectra` of the kernel that is decomposed: in function space, of the whitened one."""
    if metric is not None and method.is_matrix_factorisation(tuple(weight.shape)):
        return unfolding_spectra(method, weight, metric)
    return method.spectra(_whitened(method, weight, metric), squares)


def unfolding_spectra(method: Multilinear, weight: Tensor, metric: Metric | None) -> list[Tensor]:
    """The squares of the singular values of the method's `unfoldings`, largest first, of the same kernel."""
    if metric is not None and method.is_matrix_factorisation(tuple(weight.shape)):
        return [eigenvalues(_gram(weight.flatten(1).to(metric.inputs.dtype), metric))]
    return [squared_singular_values(matrix) for matrix in method.unfoldings(_whitened(method, weight, metric))]


def _whitened(method: Multilinear, weight: Tensor, metric: Metric | None) -> Tensor:
    return weight if metric is None else metric.roots(method.axes(tuple(weight.shape))).whiten(weight)


@dataclass(frozen=True)
class _State:
    """Whitened factors; what they leave of the kernel (T × n, not whitened); half the gradient of its squared norm."""

    tensors: list[Tensor]
    rest: Tensor
    pulled: Tensor
    squared: float


@dataclass(frozen=True)
class _Problem:
    """Refining the whitened factors of a kernel of this shape, in a norm."""

    method: Multilinear
    shape: Shape
    axes: Axes
    roots: Roots
    metric: Metric

    def state(self, tensors: list[Tensor], weight: Tensor) -> _State:
        rebuilt = self.method.contract(self.roots.unwhiten_factors(tensors, self.axes), self.shape)
        rest = (weight - rebuilt).flatten(1)
        pulled = self.metric.apply(rest)
        return _State(tensors, rest, pulled, max(float((pulled * rest).sum()), 0.0))

    def refined(self, state: _State, weight: Tensor) -> list[Tensor]:
        """Better whitened factors of a kernel, or the same ones."""
        start, rest, squared = state.tensors, state.rest, state.squared
        sizes = self._sizes(start)
        outputs, inputs = (
            {mode: sizes.get(mode, n) for mode, n in part.items()} for part in (self.axes.outputs, self.axes.inputs)
        )
        axes = Axes(outputs, inputs, self.axes.factors)
        shape = (sizes.get("t", self.shape[0]), sizes.get("s", self.shape[1]), *self.shape[2:])
        most, work, stalled = SKETCH if self.metric.is_sketch else FULL
        t, n = shape[0], math.prod(inputs.values())
        is_full = self.metric.outputs is not None and self.metric.outputs.ndim == 2
        steps = min(most, int(work / (INNER * t * n * (n + t * is_full))))
        if steps == 0 or squared == 0 or (isinstance(self.metric.inputs, Rows) and n > WIDEST):
            return start
        pulled = self.roots.pull_back(state.pulled)
        bases = self._subspaces(start, pulled, sizes)
        metric = self.roots.whitened(self.metric, bases)
        inside = on_factors(start, self.axes, bases)

        def contract(tensors: Sequence[Tensor]) -> Tensor:
            return self.method.contract(tensors, shape).flatten(1)

        if bases:
            # The best kernel in the subspace. What it leaves, no factors in the subspace can lower.
            pulled = _projected(pulled, self.axes, bases)
            rest = metric.solve(pulled).to(rest)
            offset = max(squared - float((rest * pulled).sum()), 0.0)
        else:
            rest, offset = self.roots.whiten(rest.reshape(self.shape)).flatten(1), 0.0
        found = refine(contract, inside, contract(inside) + rest, metric, steps, stalled, offset)
        lifted = self.state(on_factors(found, axes, {mode: basis.mT for mode, basis in bases.items()}), weight)
        return lifted.tensors if lifted.squared < squared else start

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """For each channel mode the factor that alone has it, and its axis there."""
        return {
            modes[0]: (number, axis)
            for number, factor in enumerate(self.axes.factors)
            for axis, modes in enumerate(factor)
            if modes in (("s",), ("t",))
        }

    def _sizes(self, start: list[Tensor]) -> dict[str, int]:
        """The dimensions of the subspaces; channel modes that are no larger are left out."""
        found = {}
        for mode, (number, axis) in self._places.items():
            n = start[number].shape[axis]
            own = min(n, start[number].numel() // n)
            size = min(max(int(MORE * own), own + 8), 2 * own)
            if size <= WORTHWHILE * n and math.prod(self.shape) * math.prod(self.shape[1:]) > SMALL:
                found[mode] = size
        return found

    def _subspaces(self, start: list[Tensor], pulled: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Orthonormal bases (n × size) of what the factors span, and of where the first step would go."""
        if not sizes:
            return {}
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in start]
            value = self.method.contract(leaves, self.shape).flatten(1)
            gradients = torch.autograd.grad(value, leaves, pulled)
        bases = {}
        for mode, size in sizes.items():
            number, axis = self._places[mode]
            spanned, wanted = (t[number].detach().movedim(axis, 0).flatten(1) for t in (start, gradients))
            bases[mode] = _basis(spanned, wanted, size)
        return bases


def _basis(spanned: Tensor, wanted: Tensor, size: int) -> Tensor:
    """An orthonormal basis (n × size) of all columns of `spanned`, and of the largest directions of `wanted`."""
    own = torch.linalg.qr(spanned).Q
    rest = wanted - own @ (own.T @ wanted)
    others = torch.linalg.svd(rest, full_matrices=False).U[:, : size - own.shape[1]]
    return torch.linalg.qr(torch.cat([own, others], 1)).Q


def _projected(gradient: Tensor, axes: Axes, bases: Mapping[str, Tensor]) -> Tensor:
    """A gradient (T × n) with respect to a kernel, in the subspaces."""
    (found,) = on_factors(
        [gradient], Axes(axes.outputs, axes.inputs, ((tuple(axes.outputs), tuple(axes.inputs)),)), bases
    )
    return found
