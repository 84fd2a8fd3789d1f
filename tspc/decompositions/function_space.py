"""Decomposition in function space: the error of a layer's output instead of the error of its kernel.

Take the kernel as a T × (S·H·W) matrix. For input patches x the mean squared error of the output is
E‖(K − K̂)x‖² = ‖(K − K̂)Σ^½‖² with Σ = E[xxᵀ]. Three steps, the same for every method, make it small:

1. whiten: Σ is close to a Kronecker product over the kernel's modes. Every mode is multiplied by the root of its
   marginal covariance, and the ordinary method decomposes the whitened kernel;
2. refine: Levenberg-Marquardt changes all factors together in the exact norm. Conjugate gradients solve the linear
   systems (Tichavský, Phan & Cichocki, "Krylov-Levenberg-Marquardt algorithm for structured Tucker tensor
   decompositions", IEEE JSTSP 2021). A method is multilinear in its factors, so this needs `contract` only;
3. un-whiten: the factors' modes are multiplied by the inverse roots.

For a matrix the whitened truncated SVD is already the optimum, and nothing is refined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tspc.decompositions.kernels import Axes, Rank, Shape
from tspc.decompositions.refinement import INNER, STALLED, refine

ROOT_FLOOR = 1e-6
"""Least eigenvalue of a mode's covariance, as a share of the mean eigenvalue; smaller ones are raised to it."""
FULL, SKETCH = (12, 5e11), (3, 5e10)
"""The largest number of Levenberg-Marquardt steps, and of their multiply-adds with the metric."""
LARGE = 2**25
"""A whitened metric of more bytes is not kept."""
SKETCHED = 0.3
"""Refining a sketch ends when the squared error falls by less than this share; most kernels need one step."""


class Multilinear(Protocol):
    """What this module needs of a method: a plain fit, and a contraction that is linear in each factor."""

    def axes(self, shape: Shape) -> Axes: ...

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]: ...

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor: ...

    def is_matrix_factorisation(self, shape: Shape) -> bool: ...


@dataclass(frozen=True)
class Metric:
    """The norm ‖D‖² = tr(G D Σ Dᵀ) of a difference D (T × n) of kernels.

    `inputs` is Σ (n × n, n = S·H·W in this order), positive definite. `outputs` is G (T × T), or the diagonal of G (T);
    it says how much the network's answer depends on the layer's outputs. None means the identity. Kernels are fitted in
    the precision of these matrices, which is float64 except for a sketch. With `is_sketch` a fit is fast and
    approximate.
    """

    inputs: Tensor
    outputs: Tensor | None = None
    is_sketch: bool = False
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def roots(self, axes: Axes) -> Roots:
        """The matrices that whiten the modes of a kernel; computed once for all methods with the same modes."""
        return self._once(("roots", *axes.modes), lambda: Roots(axes, self))

    def whitened(self, axes: Axes) -> Metric:
        """The same norm for whitened kernels; computed once unless it is large."""
        if self.inputs.nbytes > LARGE:
            return self.roots(axes).whitened(self)
        return self._once(("whitened", *axes.modes), lambda: self.roots(axes).whitened(self))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def apply(self, difference: Tensor) -> Tensor:
        """G D Σ: half the gradient of the squared norm."""
        product = difference @ self.inputs
        if self.outputs is None:
            return product
        return self.outputs @ product if self.outputs.ndim == 2 else self.outputs[:, None] * product

    def sketch(self) -> Metric:
        """The same norm in float32, for quick fits."""
        return Metric(self.inputs.float(), None if self.outputs is None else self.outputs.float(), is_sketch=True)

    def single(self) -> Metric:
        """The same norm in float32; computed once for all ranks."""
        if self.inputs.dtype == torch.float32:
            return self
        return self._once("single", lambda: replace(self.sketch(), is_sketch=False))

    def squared(self, difference: Tensor) -> float:
        """‖D‖². Rounding could make it negative; it is then 0."""
        return max(float((self.apply(difference) * difference).sum()), 0.0)

    def steps(self, outputs: int) -> int:
        """The number of refining steps for a kernel with this number of outputs."""
        most, work = SKETCH if self.is_sketch else FULL
        return min(most, int(work / (INNER * outputs * self.inputs.numel())))


def fit(method: Multilinear, weight: Tensor, rank: Rank, metric: Metric) -> list[Tensor]:
    """Factors of a finite kernel, in the metric's precision, with a small error in its norm.

    The error is at most the error of the plain fit. A sketch does not compare with the plain fit.
    """
    weight = weight.to(metric.inputs)
    shape = tuple(weight.shape)
    axes = method.axes(shape)
    roots = metric.roots(axes)
    target = roots.whiten(weight)
    start = list(method.fit(target, rank))

    def contract(tensors: Sequence[Tensor]) -> Tensor:
        return method.contract(tensors, shape).flatten(1)

    def squared_error(tensors: Sequence[Tensor]) -> float:
        return metric.squared(weight.flatten(1) - contract(tensors))

    if not metric.is_sketch:
        plain = list(method.fit(weight, rank))
        if squared_error(plain) < squared_error(roots.unwhiten_factors(start, axes)):
            start = roots.whiten_factors(plain, axes)
    steps = 0 if method.is_matrix_factorisation(shape) else metric.steps(len(weight))
    if steps > 0:
        stalled = SKETCHED if metric.is_sketch else STALLED
        start = refine(contract, start, target.flatten(1), metric.whitened(axes), steps, stalled)
    return roots.unwhiten_factors(start, axes)


def whitened(method: Multilinear, weight: Tensor, metric: Metric) -> Tensor:
    """The kernel with each mode multiplied by the root of its covariance; this one is decomposed."""
    return metric.roots(method.axes(tuple(weight.shape))).whiten(weight)


class Roots:
    """The roots of the modes' marginal covariances, and their inverses."""

    def __init__(self, axes: Axes, metric: Metric) -> None:
        self._outputs, self._inputs = tuple(axes.outputs), tuple(axes.inputs)
        self._sizes = axes.outputs | axes.inputs
        marginals = _marginals(metric.inputs, axes.inputs)
        if metric.outputs is not None:
            marginals |= _marginals(metric.outputs, axes.outputs)
        pairs = {mode: _root(matrix) for mode, matrix in marginals.items()}
        self._root = {mode: root for mode, (root, _) in pairs.items()}
        self._inverse = {mode: inverse for mode, (_, inverse) in pairs.items()}

    def whitened(self, metric: Metric) -> Metric:
        """The same norm for whitened kernels."""
        outer = metric.outputs
        inner = self._on_matrix(metric.inputs, self._inputs)
        return Metric(inner, None if outer is None else self._on_matrix(outer, self._outputs))

    def whiten(self, weight: Tensor) -> Tensor:
        flat = _multiply(weight.flatten(1), (self._outputs, self._inputs), self._sizes, self._root)
        return flat.reshape(weight.shape)

    def whiten_factors(self, tensors: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        return self._on_factors(tensors, axes, self._root)

    def unwhiten_factors(self, tensors: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        return self._on_factors(tensors, axes, self._inverse)

    def _on_factors(self, tensors: Sequence[Tensor], axes: Axes, matrices: Mapping[str, Tensor]) -> list[Tensor]:
        return [_multiply(t, modes, self._sizes, matrices) for t, modes in zip(tensors, axes.factors, strict=True)]

    def _on_matrix(self, matrix: Tensor, modes: tuple[str, ...]) -> Tensor:
        if matrix.ndim == 1:  # a diagonal: both sides at once
            squares = {mode: self._inverse[mode].square() for mode in modes if mode in self._inverse}
            return _multiply(matrix, (modes,), self._sizes, squares)
        return _multiply(matrix, (modes, modes), self._sizes, self._inverse)


def _multiply(
    tensor: Tensor, modes: Sequence[Sequence[str]], sizes: Mapping[str, int], matrices: Mapping[str, Tensor]
) -> Tensor:
    """Multiplies every mode that has a symmetric matrix by it. An axis may hold several modes or none.

    A vector means a diagonal matrix.
    """
    labels: list[str] = []
    split: list[int] = []
    for names, n in zip(modes, tensor.shape, strict=True):
        labels += names or ("",)
        split += [sizes[name] for name in names] or [n]
    result = tensor.reshape(split)
    for axis, label in enumerate(labels):
        if label in matrices:
            matrix, last = matrices[label], result.movedim(axis, -1)
            result = (last @ matrix if matrix.ndim == 2 else last * matrix).movedim(-1, axis)
    return result.reshape(tensor.shape)


def _marginals(matrix: Tensor, modes: Mapping[str, int]) -> dict[str, Tensor]:
    """For every mode the covariance summed over all other modes, with mean eigenvalue 1. A diagonal gives diagonals."""
    sizes = tuple(modes.values())
    result = {}
    for axis, (mode, n) in enumerate(modes.items()):
        before, after = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
        if matrix.ndim == 1:
            marginal = matrix.reshape(before, n, after).sum((0, 2))
            trace, unit = marginal.sum(), torch.ones_like(marginal)
        else:
            marginal = torch.einsum("aibajb->ij", matrix.reshape(before, n, after, before, n, after))
            trace, unit = marginal.trace(), torch.eye(n, dtype=marginal.dtype, device=marginal.device)
        result[mode] = marginal * (n / trace) if trace > 0 else unit
    return result


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive semidefinite matrix and its inverse; small eigenvalues are raised.

    Computed in float64, because float32 cannot resolve eigenvalues as small as the floor.
    """
    if matrix.ndim == 1:
        root = matrix.double().clamp(min=ROOT_FLOOR).sqrt()
        return root.to(matrix), (1 / root).to(matrix)
    values, vectors = torch.linalg.eigh((matrix + matrix.T).double() / 2)
    roots = values.clamp(min=ROOT_FLOOR).sqrt()
    return ((vectors * roots) @ vectors.T).to(matrix), ((vectors / roots) @ vectors.T).to(matrix)
