"""What a layer may become: a method at a width of its factors' entries, and how large that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from torch import Tensor

from tspc.compression.error_curve import ErrorCurve
from tspc.compression.plan import PARAMETERS, LayerPlan
from tspc.decompositions import SVD, Decomposition, Dense, Method, Metric, Rank, Shape
from tspc.quantization.factors import expected_share, measured_share, nearest
from tspc.quantization.grids import FULL, factor_bytes

DENSE = Dense()
OF_TABLES = SVD()
"""The decomposition of tables of embeddings, whatever that of the layers is."""
SAFE = 8
"""The width at which rounding costs hardly anything; where the plan chooses widths, layers that a rule keeps dense have
it."""
ROUNDED = 0.2
"""The size of the fit whose factors are rounded, as a share of the kernel; it shows what rounding changes."""


@lru_cache(maxsize=65536)
def rank_for(method: Decomposition, shape: Shape, budget: int, multiple: int = 1) -> Rank:
    """`Decomposition.rank_for`; layers of the same shape share its results."""
    return method.rank_for(shape, budget, multiple)


def decompositions_of(method: Method, layer: LayerPlan) -> tuple[Decomposition, ...]:
    """The decompositions that a layer may take under a method."""
    return (OF_TABLES,) if layer.is_table else tuple(method.candidates(layer.shape))


@dataclass(frozen=True)
class Form:
    """A method at a width; sizes are in the unit of the budget, and without the bias."""

    method: Decomposition
    bits: int = FULL
    unit: str = PARAMETERS

    def size(self, layer: LayerPlan, rank: Rank) -> int:
        """The size of the layer's factors at a rank."""
        if self.unit == PARAMETERS:
            return self.method.num_params(layer.shape, rank)
        shapes = self.method.factor_shapes(layer.shape, rank)
        factors = sum(factor_bytes(shape, self.bits, layer.entry_bytes) for shape in shapes)
        return factors + self.method.basis_bytes(layer.shape)

    def smallest(self, layer: LayerPlan, multiple: int) -> int:
        """The size at the smallest rank."""
        return self.size(layer, tuple(min(multiple, top) for top in self.method.max_rank(layer.shape)))

    def rank_for(self, layer: LayerPlan, budget: int, multiple: int) -> Rank:
        """The largest rank within a budget, which is at least `smallest`."""
        if self.unit == PARAMETERS:
            return rank_for(self.method, layer.shape, budget, multiple)
        bits = self.bits if self.bits < FULL else 8 * layer.entry_bytes
        least = self.method.min_params(layer.shape, multiple)
        params = max(budget * 8 // bits, least)
        while True:  # the scales leave a little less than this
            rank = rank_for(self.method, layer.shape, params, multiple)
            excess = self.size(layer, rank) - budget
            if excess <= 0 or params == least:
                return rank
            params = max(params - max(excess * 8 // bits, 1), least)

    def at(self, layer: LayerPlan, rank: Rank) -> LayerPlan:
        """The row of a layer that becomes this."""
        params = self.method.num_params(layer.shape, rank) + layer.bias_params
        return replace(layer, method=self.method, rank=rank, params=params, bits=self.bits)


@dataclass(frozen=True)
class FormCurve:
    """The error of one layer in one form against its size, from the error curve of the method."""

    form: Form
    curve: ErrorCurve
    sizes: tuple[int, ...]
    """The sizes at the samples of the curve, and of the dense kernel."""

    @classmethod
    def of(cls, form: Form, curve: ErrorCurve, layer: LayerPlan) -> FormCurve:
        if form.unit == PARAMETERS:
            return cls(form, curve, (*curve.params, curve.dense))
        ranks = [rank_for(form.method, layer.shape, params) for params in curve.params]
        whole = factor_bytes(layer.shape, form.bits, layer.entry_bytes)
        return cls(form, curve, (*(form.size(layer, rank) for rank in ranks), whole))

    def on(self, sizes: np.ndarray) -> np.ndarray:
        """The expected squared relative errors at sizes without the bias, rounding included."""
        params = np.interp(sizes, np.maximum.accumulate(self.sizes), (*self.curve.params, self.curve.dense))
        truncated = self.curve.on(params)
        return truncated + self.curve.rounding_at(self.form.bits) * self._growth(params) * (1 - truncated)

    def _growth(self, params: np.ndarray) -> np.ndarray | float:
        """How much larger the error of rounding is than that of the fit in which it was measured.

        Each further component adds about the same error, and less and less to the kernel. A whole kernel has none.
        """
        return 1.0 if self.form.method == DENSE else np.maximum(1.0, params / (ROUNDED * self.curve.dense))

    def at(self, size: int) -> float:
        """The same at one size."""
        return float(self.on(np.array([size]))[0])


@dataclass(frozen=True)
class Widths:
    """The widths that factors may have, and what the budget counts."""

    bits: tuple[int, ...] = (FULL,)
    unit: str = PARAMETERS

    @property
    def offers_dense(self) -> bool:
        """Whether a layer may keep its whole kernel in one of these widths."""
        return min(self.bits) < FULL

    def methods(self, method: Method, layer: LayerPlan) -> tuple[Decomposition, ...]:
        """The methods that a layer may take."""
        found = () if layer.is_whole else decompositions_of(method, layer)
        return tuple(dict.fromkeys((*found, DENSE))) if self.offers_dense else found

    def least_error(self, dense: ErrorCurve | None) -> float:
        """The squared error of a layer with its whole kernel: of several widths, the largest one is float32."""
        return dense.rounding_at(self.bits[0]) if dense is not None and not self.is_choice else 0.0

    @property
    def is_choice(self) -> bool:
        """Whether the budget decides the width of each layer."""
        return len(self.bits) > 1

    @property
    def of_rules(self) -> int:
        """The width of layers that a rule keeps dense."""
        return SAFE if self.is_choice else self.bits[0]


PLAIN = Widths()
"""Floating-point numbers, under a budget of parameters."""


def rounding(
    method: Decomposition,
    kernel: Tensor,
    metric: Metric | None,
    widths: Sequence[int],
    squared: Callable[[Tensor], float],
    is_table: bool = False,
) -> tuple[tuple[int, float], ...]:
    """For each width the squared relative error that rounding adds, from the factors of one fit.

    What error feedback leaves of it is known about, or for a table measured.
    """
    shape, narrow = tuple(kernel.shape), [bits for bits in widths if bits != FULL]
    whole = squared(kernel.flatten(1))
    if not narrow or not whole > 0:
        return ()
    size = max(int(ROUNDED * kernel.numel()), method.min_params(shape))
    factors = method.sketch().decompose(kernel, rank_for(method, shape, size), metric)
    rebuilt, usual = method.reconstruct(factors), expected_share(method, shape, metric)
    kept = squared(rebuilt.flatten(1))

    def added(bits: int) -> float:
        rounded = method.reconstruct(nearest(factors, bits).factors)
        gained = measured_share(method, kernel, bits, metric) if is_table else usual
        return min(1.0, gained * squared((rounded - rebuilt).flatten(1)) / kept) if kept > 0 else 0.0

    return tuple((bits, added(bits)) for bits in narrow)
