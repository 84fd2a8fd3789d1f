"""Divides one budget of parameters or bytes among the layers of a network.

- `uniform`: every layer has the same rate, or a rate that depends on the depth, as in arXiv:1805.10352;
- `overall`, called `global` in the settings: the least sum of the layers' weighted squared relative errors. Each
  layer takes the size and the method that minimise squared error + λ·parameters. "Dense" is one of the choices. λ is
  chosen such that the sum of the sizes meets the budget (Shoham & Gersho, IEEE TASSP 1988).

Whole ranks leave some parameters over. They are then spent one rank at a time, or on wider entries of one whole kernel,
until nothing further fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tspc.compression.error_curve import Curves
from tspc.compression.form import DENSE, PLAIN, Form, FormCurve, Widths
from tspc.compression.plan import SLOWER, LayerPlan
from tspc.decompositions import Method, Rank

BISECTIONS = 100
KEPT_SHARE = 0.5
"""If some layers stay dense for speed, the others keep at least this share of their parameters."""
SIZES = 96
"""The number of sizes of a layer, from its smallest form to the dense one, for the global allocation."""


@dataclass(frozen=True)
class Candidate:
    """A layer that shares the budget, with the forms that it may take and their error curves (empty if unknown)."""

    layer: LayerPlan
    forms: tuple[Form, ...]
    curves: tuple[FormCurve, ...]
    multiple: int
    least_error: float = 0.0
    """The squared error of the whole kernel: with one width for all layers, that of its rounding."""

    @property
    def unit(self) -> str:
        return self.forms[0].unit

    @property
    def minimum(self) -> int:
        """The size of the smallest form, with bias."""
        return min(self.smallest.values())

    @property
    def dense_size(self) -> int:
        return self.layer.dense_size(self.unit)

    @property
    def weight(self) -> float:
        return self.curves[0].curve.weight if self.curves else 1.0

    @property
    def bias(self) -> int:
        """The size of the bias in the largest width."""
        return replace(self.layer, bits=max(form.bits for form in self.forms)).bias_size(self.unit)

    @cached_property
    def smallest(self) -> dict[Form, int]:
        """For each form its smallest size, with bias."""
        return {form: form.smallest(self.layer, self.multiple) + self.bias for form in self.forms}

    @property
    def sizes(self) -> np.ndarray:
        """SIZES sizes from the smallest form to the dense one. A whole kernel has no others than those of its forms."""
        if not self.layer.is_whole:
            return np.linspace(self.minimum, self.dense_size, SIZES).astype(int)
        known = sorted({*self.smallest.values(), self.dense_size})
        return np.array(known[:1] * (SIZES - len(known)) + known)

    def squared_error(self, form: Form, size: int) -> float:
        """Expected squared relative error at this size, bias included."""
        return self._curve(form).at(size - self.bias)

    def squared_errors(self, sizes: np.ndarray) -> np.ndarray:
        """The expected squared relative error of the best form at each size, bias included."""
        of_each = [
            np.where(sizes >= smallest, self._curve(form).on(sizes - self.bias), np.inf)
            for form, smallest in self.smallest.items()
        ]
        return np.min(of_each, axis=0)

    def _curve(self, form: Form) -> FormCurve:
        return next(curve for curve in self.curves if curve.form == form)

    def best(self, share: int) -> Form:
        """The form with the least expected error within a share."""
        fitting = [form for form, smallest in self.smallest.items() if smallest <= share]
        return fitting[0] if len(fitting) == 1 else min(fitting, key=lambda form: self.squared_error(form, share))

    def within(self, share: int) -> LayerPlan:
        """The layer at the largest rank within a share; dense if the share is large enough."""
        if share >= self.dense_size:
            return self.dense()
        share = max(share, self.minimum)
        form = self.best(share)
        return self.at(form, form.rank_for(self.layer, share - self.bias, self.multiple))

    def dense(self) -> LayerPlan:
        return replace(self.layer, output_error=math.sqrt(self.least_error))

    def whole(self) -> LayerPlan:
        """The layer with its whole kernel, in the largest of the widths that it may have."""
        kept = [form for form in self.forms if form.method == DENSE]
        return self.at(max(kept, key=lambda form: form.bits), ()) if kept else self.dense()

    def at(self, form: Form, rank: Rank) -> LayerPlan:
        row = form.at(self.layer, rank)
        expected = math.sqrt(self.squared_error(form, row.size(self.unit))) if self.curves else None
        return replace(row, output_error=expected)

    def raised(self, layer: LayerPlan) -> list[LayerPlan]:
        """Rows of this layer, one rank higher in one entry, or in the next wider entries, that stay below dense."""
        if layer.method is None or layer.rank is None:
            return []
        form = Form(layer.method, layer.bits, self.unit)
        if layer.method == DENSE:  # it has no rank, only wider entries
            wider = [each for each in self.forms if each.method == DENSE and each.bits > layer.bits]
            return [self.at(min(wider, key=lambda each: each.bits), ())] if wider else []
        above = [self.at(form, rank) for rank in form.method.raised(layer.shape, layer.rank, self.multiple)]
        return [row for row in above if row.size(self.unit) < self.dense_size]


def candidate(
    layer: LayerPlan, method: Method, curves: Curves | None, multiple: int, widths: Widths = PLAIN
) -> Candidate | None:
    """The layer as a candidate; None if no form makes it smaller, even at the smallest rank."""
    made = [Form(each, bits, widths.unit) for each in widths.methods(method, layer) for bits in widths.bits]
    whole = layer.dense_size(widths.unit) - layer.bias_size(widths.unit)
    forms = tuple(form for form in made if form.smallest(layer, multiple) < whole)
    by_method = {} if curves is None else {curve.method: curve for curve in curves[layer.name]}
    known = () if curves is None else tuple(FormCurve.of(f, by_method[f.method], layer) for f in forms)
    return Candidate(layer, forms, known, multiple, widths.least_error(by_method.get(DENSE))) if forms else None


def uniform(candidates: Sequence[Candidate], weights: Sequence[float], budget: int) -> list[LayerPlan]:
    """Gives each layer a share in proportion to weight × size, with the largest factor that the budget allows.

    A share is at least the smallest form of the layer, and below its dense size.
    """

    def at(scale: float) -> list[LayerPlan]:
        shares = [math.floor(scale * w * c.dense_size) for c, w in zip(candidates, weights, strict=True)]
        # Below dense: with one rate for all, no layer stays dense.
        return [c.within(min(s, c.dense_size - 1)) for c, s in zip(candidates, shares, strict=True)]

    best, low, high = at(0.0), 0.0, 1.0 / min(weights)
    for _ in range(BISECTIONS // 3):
        middle = (low + high) / 2
        tried = at(middle)
        if _total(candidates, tried) <= budget:
            best, low = tried, middle
        else:
            high = middle
    return _filled(candidates, best, budget)


def overall(candidates: Sequence[Candidate], budget: int) -> list[LayerPlan]:
    """The least sum of weighted squared relative errors within the budget."""
    sizes = np.array([c.sizes for c in candidates])
    errors = np.array([c.weight * c.squared_errors(row) for c, row in zip(candidates, sizes, strict=True)])
    errors[:, -1] = [c.weight * c.least_error for c in candidates]  # the last size is the dense layer
    rows = np.arange(len(candidates))

    def shares(price: float) -> np.ndarray:
        return sizes[rows, (errors + price * sizes).argmin(axis=1)]

    low, high = 1e-18, 1e6
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        if shares(middle).sum() <= budget:
            high = middle
        else:
            low = middle
    layers = [c.within(int(share)) for c, share in zip(candidates, shares(high), strict=True)]
    return _filled(candidates, layers, budget)


def _filled(candidates: Sequence[Candidate], layers: list[LayerPlan], budget: int) -> list[LayerPlan]:
    """Raises ranks, or widths of whole kernels, step by step while the budget allows it, the largest gain first.

    No layer becomes dense.
    """
    layers = list(layers)
    left = budget - _total(candidates, layers)
    raised = [_raised(c, layer) for c, layer in zip(candidates, layers, strict=True)]
    while True:
        # The first rank that fits: the one whose entry is the smallest.
        fitting = [next((r for r in ranks if r.cost <= left), None) for ranks in raised]
        steps = [(step.gain, -i, step) for i, step in enumerate(fitting) if step is not None]
        if not steps:
            return layers
        _, index, step = max(steps, key=lambda step: step[:2])
        left -= step.cost
        layers[-index] = step.layer
        raised[-index] = _raised(candidates[-index], step.layer)


def _total(candidates: Sequence[Candidate], layers: Sequence[LayerPlan]) -> int:
    return sum(layer.size(c.unit) for c, layer in zip(candidates, layers, strict=True))


@dataclass(frozen=True)
class _Step:
    """A layer one rank higher, what it takes of the budget, and the gain for each unit of that."""

    layer: LayerPlan
    cost: int
    gain: float


def _raised(candidate: Candidate, layer: LayerPlan) -> list[_Step]:
    """What `Candidate.raised` gives, with its costs and gains."""
    unit = candidate.unit
    costs = [(row, row.size(unit) - layer.size(unit)) for row in candidate.raised(layer)]
    # A rank more may add no byte, where entries of few bits fill a byte that was begun.
    return [_Step(row, cost, candidate.weight * _gain(layer, row, max(cost, 1), unit)) for row, cost in costs]


def without_slower(
    candidates: Sequence[Candidate],
    budget: int,
    ranked: list[LayerPlan],
    share_out: Callable[[Sequence[Candidate], int], list[LayerPlan]],
    is_slow: Callable[[LayerPlan], bool],
) -> list[LayerPlan]:
    """Changes an allocation: layers that tensorization does not make faster stay dense.

    Small layers come first. They stay dense only while the other layers keep `KEPT_SHARE` of their parameters.
    `share_out` makes an allocation of the given layers under a budget.
    """
    dense: dict[str, LayerPlan] = {}
    own = {row.name: row.size(c.unit) for c, row in zip(candidates, ranked, strict=True)}
    while True:
        left = budget - sum(c.whole().size(c.unit) for c in candidates if c.layer.name in dense)
        slow = [c for c in candidates if c.layer.name not in dense and _is_slow(c, ranked, is_slow)]
        before = len(dense)
        for one in sorted(slow, key=lambda c: c.dense_size):
            others = [c for c in candidates if c.layer.name not in dense and c is not one]
            rest = left - one.whole().size(one.unit)
            if rest >= max(sum(c.minimum for c in others), KEPT_SHARE * sum(own[c.layer.name] for c in others)):
                dense[one.layer.name] = replace(one.whole(), reason=SLOWER)
                left = rest
        if len(dense) == before:
            return ranked
        others = [c for c in candidates if c.layer.name not in dense]
        ranked = [*dense.values(), *(share_out(others, left) if others else [])]


def _is_slow(candidate: Candidate, ranked: list[LayerPlan], is_slow: Callable[[LayerPlan], bool]) -> bool:
    row = next(row for row in ranked if row.name == candidate.layer.name)
    return row.method not in (None, DENSE) and is_slow(row)


def _gain(layer: LayerPlan, above: LayerPlan, cost: int, unit: str) -> float:
    """How much one more unit lowers the expected squared error; without errors, layers of low rate come first."""
    if layer.output_error is None or above.output_error is None:
        return -layer.size(unit) / layer.dense_size(unit)
    return (layer.output_error**2 - above.output_error**2) / cost
