"""The norm of a kernel's error in function space, and the matrices that whiten the kernel's modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from tspc.decompositions.kernels import Axes, double
from tspc.decompositions.mode_products import multiplied, on_factors
from tspc.system.precision import rough

WORTH_ROUNDING = 256
"""With more inputs than this, products in a shorter number format are faster, its conversions included."""
FLOOR, GROWTH = 1e-6, 100.0
"""Added to the diagonal of a mode's covariance, as a share of its mean; raised by this factor until a root exists."""


@dataclass(frozen=True)
class Rows:
    """Σ = XᵀX + λI of a few rows X (m × n), where the n × n matrix would be too large."""

    rows: Tensor
    damping: float

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def __len__(self) -> int:
        return self.rows.shape[1]

    def to(self, dtype: torch.dtype) -> Rows:
        """The same in another number format."""
        return replace(self, rows=self.rows.to(dtype))

    def after(self, matrix: Tensor) -> Tensor:
        """The matrix (T × n) times Σ."""
        return (matrix @ self.rows.mT) @ self.rows + self.damping * matrix


@dataclass(frozen=True)
class Metric:
    """The norm ‖D‖² = tr(G D Σ Dᵀ) of a difference D (T × n) of kernels.

    `inputs` is Σ (n × n, n = S·H·W in this order), positive definite, or the rows that it comes from. `outputs` is G
    (T × T), or the diagonal of G (T); it says how much the network's answer depends on the layer's outputs. None means
    the identity. With `is_sketch` a fit is fast and approximate.
    """

    inputs: Tensor | Rows
    outputs: Tensor | None = None
    is_sketch: bool = False
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def roots(self, axes: Axes) -> Roots:
        """The matrices that whiten the modes of a kernel; computed once for all methods with the same modes."""
        return self._once(("roots", *axes.modes), lambda: Roots(axes, self))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def apply(self, difference: Tensor) -> Tensor:
        """G D Σ: half the gradient of the squared norm. For a sketch it has few digits."""
        norm = self.rough() if self.is_sketch else self
        return norm.weighted(norm.after(difference.to(norm.inputs.dtype))).to(difference)

    def after(self, matrix: Tensor) -> Tensor:
        """A matrix (T × n) times Σ."""
        return matrix @ self.inputs if isinstance(self.inputs, Tensor) else self.inputs.after(matrix)

    def weighted(self, rows: Tensor) -> Tensor:
        """G times a matrix with T rows."""
        if self.outputs is None:
            return rows
        return self.outputs @ rows if self.outputs.ndim == 2 else self.outputs[:, None] * rows

    @property
    def input_root(self) -> Tensor:
        """R (n × n) with Σ = R·Rᵀ."""
        inputs = cast(Tensor, self.inputs)
        return self._once("input root", lambda: _factor(inputs).to(inputs))

    @property
    def _output_root(self) -> Tensor:
        """L (T × T, or the diagonal of L) with G = L·Lᵀ."""
        return self._once("output root", lambda: _root(cast(Tensor, self.outputs)).to(self.inputs.dtype))

    def scaled(self, rows: Tensor, transposed: bool = False) -> Tensor:
        """L times a matrix with T rows, where G = L·Lᵀ; with `transposed` Lᵀ times it."""
        if self.outputs is None:
            return rows
        root = self._output_root
        if root.ndim == 1:
            return root[:, None] * rows
        return (root.mT if transposed else root) @ rows

    def unscaled(self, rows: Tensor) -> Tensor:
        """L⁻ᵀ times a matrix with T rows."""
        if self.outputs is None:
            return rows
        root = self._output_root
        if root.ndim == 1:
            return rows / root[:, None]
        return torch.linalg.solve_triangular(root.mT, rows, upper=True)

    def solve(self, gradient: Tensor) -> Tensor:
        """The inverse of `apply`, in the precision of the norm; both matrices are positive definite."""
        inputs = cast(Tensor, self.inputs)
        solved = torch.cholesky_solve(gradient.to(inputs).T, _quick_factor(inputs)).T
        if self.outputs is None:
            return solved
        if self.outputs.ndim == 1:
            return solved / self.outputs.to(solved)[:, None]
        return torch.cholesky_solve(solved, _quick_factor(self.outputs.to(solved)))

    def sketch(self) -> Metric:
        """The same norm in float32, for quick fits."""
        return replace(self.single(), is_sketch=True)

    def single(self) -> Metric:
        """The same norm in float32; computed once for all ranks."""
        if isinstance(self.inputs, Rows) or self.inputs.dtype == torch.float32:
            return self
        narrow = None if self.outputs is None else self.outputs.float()
        inputs = self.inputs
        return self._once("single", lambda: Metric(inputs.float(), narrow, self.is_sketch))

    def rough(self) -> Metric:
        """The same norm for products that need few digits, in the format in which they are fastest."""
        inputs, outputs = self.inputs, self.outputs
        device = (inputs.rows if isinstance(inputs, Rows) else inputs).device
        dtype = rough(device) if len(inputs) >= WORTH_ROUNDING else torch.float32
        if inputs.dtype == dtype and not self.is_sketch:
            return self
        return self._once("rough", lambda: Metric(inputs.to(dtype), None if outputs is None else outputs.to(dtype)))

    def squared(self, difference: Tensor) -> float:
        """‖D‖². Rounding could make it negative; it is then 0."""
        return max(float((self.apply(difference) * difference).sum()), 0.0)


class Roots:
    """Roots R of the modes' marginal covariances, C = R·Rᵀ, and their inverses.

    A root times any rotation is a root, too, and no decomposition depends on a rotation of a mode. So these are
    Cholesky factors, which cost a small part of a symmetric root.
    """

    def __init__(self, axes: Axes, metric: Metric) -> None:
        self._outputs, self._inputs = tuple(axes.outputs), tuple(axes.inputs)
        self._sizes = axes.outputs | axes.inputs
        marginals = _marginals(metric.inputs, axes.inputs)
        if metric.outputs is not None:
            marginals |= _marginals(metric.outputs, axes.outputs)
        self._root = {mode: _root(matrix) for mode, matrix in marginals.items()}

    @cached_property
    def _inverse(self) -> dict[str, Tensor]:
        return {mode: _inverse(root) for mode, root in self._root.items()}

    @property
    def _transposed(self) -> dict[str, Tensor]:
        return {mode: root.mT if root.ndim == 2 else root for mode, root in self._inverse.items()}

    def whitened(self, metric: Metric, bases: Mapping[str, Tensor]) -> Metric:
        """The same norm for whitened kernels; `bases` (n × q, orthonormal) restrict modes to subspaces."""
        moved = self._transposed
        for mode, basis in bases.items():
            root = moved.get(mode, basis.new_ones(len(basis)))
            wide = basis.to(root)
            moved[mode] = root @ wide if root.ndim == 2 else root[:, None] * wide
        if isinstance(metric.inputs, Rows):
            inner = self._of_rows(metric.inputs, moved)
        else:
            inner = self._on_matrix(metric.inputs, self._inputs, moved)
        outer = metric.outputs
        return Metric(inner, None if outer is None else self._on_matrix(outer, self._outputs, moved))

    def whiten(self, weight: Tensor) -> Tensor:
        flat = multiplied(weight.flatten(1), (self._outputs, self._inputs), self._sizes, self._root)
        return flat.reshape(weight.shape)

    def whiten_factors(self, tensors: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        return on_factors(tensors, axes, self._root)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient (T × n) with respect to a kernel as the gradient with respect to the whitened kernel."""
        return multiplied(gradient, (self._outputs, self._inputs), self._sizes, self._transposed)

    def unwhiten_factors(self, tensors: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        return on_factors(tensors, axes, self._inverse)

    def _of_rows(self, inputs: Rows, moved: Mapping[str, Tensor]) -> Tensor:
        """The second moments of the rows, with their modes multiplied by matrices."""
        rows = multiplied(inputs.rows, ((), self._inputs), self._sizes, moved)
        shift = inputs.rows.new_ones(1, 1)
        for mode in self._inputs:
            matrix = moved[mode].to(rows)
            shift = torch.kron(shift, matrix.mT @ matrix)
        return rows.mT @ rows + inputs.damping * shift

    def _on_matrix(self, matrix: Tensor, modes: tuple[str, ...], moved: Mapping[str, Tensor]) -> Tensor:
        if matrix.ndim == 2:
            return multiplied(matrix, (modes, modes), self._sizes, moved)
        bases = [moved[mode].to(matrix) for mode in modes if mode in moved and moved[mode].ndim == 2]
        if bases:  # of many outputs, such as the tokens of a table: their whole matrix would be too large
            (basis,) = bases
            return basis.mT @ (matrix[:, None] * basis)
        squares = {mode: moved[mode].square() for mode in modes if mode in moved}  # a diagonal: both sides at once
        return multiplied(matrix, (modes,), self._sizes, squares)


def _marginals(matrix: Tensor | Rows, modes: Mapping[str, int]) -> dict[str, Tensor]:
    """For every mode the covariance summed over all other modes, with mean eigenvalue 1. A diagonal gives diagonals."""
    sizes = tuple(modes.values())
    result = {}
    for axis, (mode, n) in enumerate(modes.items()):
        marginal = _marginal(matrix, math.prod(sizes[:axis]), n, math.prod(sizes[axis + 1 :]))
        is_diagonal = marginal.ndim == 1
        trace = marginal.sum() if is_diagonal else marginal.trace()
        if trace > 0:
            result[mode] = marginal * (n / trace)
        else:
            result[mode] = torch.ones_like(marginal) if is_diagonal else _identity(marginal)
    return result


def _marginal(matrix: Tensor | Rows, before: int, n: int, after: int) -> Tensor:
    """The sum over the modes before and after a mode of size n."""
    if isinstance(matrix, Rows):
        slices = matrix.rows.reshape(-1, n, after).movedim(1, 0).flatten(1)
        return slices @ slices.mT + matrix.damping * (before * after) * _identity(slices)
    if matrix.ndim == 1:
        return matrix.reshape(before, n, after).sum((0, 2))
    whole = matrix.reshape(before, n, after, before, n, after)
    return whole.diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).sum((-1, -2))


def _root(matrix: Tensor) -> Tensor:
    """A lower triangular root of a positive semidefinite matrix, in float64; of a diagonal its square root."""
    wide = double(matrix)
    if wide.ndim == 1:
        return wide.clamp(min=max(FLOOR * float(wide.mean()), torch.finfo(wide.dtype).tiny)).sqrt()
    return _factor(wide, FLOOR)


def _inverse(root: Tensor) -> Tensor:
    if root.ndim == 1:
        return 1 / root
    return torch.linalg.solve_triangular(root, _identity(root), upper=False)


def _quick_factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor in the matrix's own precision; computed in float64 if that is not enough."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    return root if not int(failed) else _factor(matrix).to(matrix)


def _factor(matrix: Tensor, floor: float = 0.0) -> Tensor:
    """The Cholesky factor in float64, with `floor` × the mean of the diagonal added to it, or as much as is needed."""
    # Of the matrix only the lower triangle is read. It is changed in place, because wide ones take much memory.
    wide = matrix.clone() if matrix.dtype == torch.float64 else double(matrix)
    diagonal = wide.diagonal().clone()
    mean = max(float(diagonal.mean()), torch.finfo(torch.float64).tiny)
    while True:
        wide.diagonal().copy_(diagonal + floor * mean)
        root, failed = torch.linalg.cholesky_ex(wide)
        if not int(failed) or not bool(wide.isfinite().all()):
            return root
        floor = max(floor * GROWTH, 1e-12)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)
