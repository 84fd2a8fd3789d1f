"""Divides one budget of parameters among the layers of a network.

- `uniform`: every layer has the same rate, or a rate that depends on the depth, as in arXiv:1805.10352;
- `overall`, called `global` in the settings: the least sum of the layers' weighted squared relative errors. Each
  layer takes the size and the method that minimise squared error + λ·parameters. "Dense" is one of the choices. λ is
  chosen such that the sum of the sizes meets the budget (Shoham & Gersho, IEEE TASSP 1988).

Whole ranks leave some parameters over. They are then spent one rank at a time, until no further rank fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tspc.compression.curves import rank_for
from tspc.compression.error_curve import Curves, ErrorCurve
from tspc.compression.plan import SLOWER, LayerPlan
from tspc.decompositions import Decomposition, Method, Rank

BISECTIONS = 100
KEPT_SHARE = 0.5
"""If some layers stay dense for speed, the others keep at least this share of their parameters."""
SIZES = 96
"""The number of sizes of a layer, from its smallest form to the dense one, for the global allocation."""


@dataclass(frozen=True)
class Candidate:
    """A layer that shares the budget, with its candidate methods and their error curves (empty if unknown)."""

    layer: LayerPlan
    methods: tuple[Decomposition, ...]
    curves: tuple[ErrorCurve, ...]
    multiple: int

    @property
    def minimum(self) -> int:
        """Parameters of the smallest form, with bias."""
        return min(self.smallest.values())

    @property
    def weight(self) -> float:
        return self.curves[0].weight if self.curves else 1.0

    @cached_property
    def smallest(self) -> dict[Decomposition, int]:
        """For each method the parameters of its smallest form, with bias."""
        bias = self.layer.bias_params
        return {method: method.min_params(self.layer.shape, self.multiple) + bias for method in self.methods}

    def squared_error(self, method: Decomposition, params: int) -> float:
        """Expected squared relative error with this number of parameters, bias included."""
        return self._curve(method).at(params - self.layer.bias_params)

    def squared_errors(self, sizes: np.ndarray) -> np.ndarray:
        """The expected squared relative error of the best method at each size, bias included."""
        of_each = [
            np.where(sizes >= smallest, self._curve(method).on(sizes - self.layer.bias_params), np.inf)
            for method, smallest in self.smallest.items()
        ]
        return np.min(of_each, axis=0)

    def _curve(self, method: Decomposition) -> ErrorCurve:
        return next(curve for curve in self.curves if curve.method == method)

    def best(self, share: int) -> Decomposition:
        """The method with the least expected error within a share, in parameters."""
        fitting = [method for method, smallest in self.smallest.items() if smallest <= share]
        return fitting[0] if len(fitting) == 1 else min(fitting, key=lambda m: self.squared_error(m, share))

    def within(self, share: int) -> LayerPlan:
        """The layer at the largest rank within a share, in parameters; dense if the share is large enough."""
        if share >= self.layer.dense_params:
            return self.dense()
        share = max(share, self.minimum)
        method = self.best(share)
        return self.at(method, rank_for(method, self.layer.shape, share - self.layer.bias_params, self.multiple))

    def dense(self) -> LayerPlan:
        return replace(self.layer, output_error=0.0)

    def at(self, method: Decomposition, rank: Rank) -> LayerPlan:
        params = method.num_params(self.layer.shape, rank) + self.layer.bias_params
        expected = math.sqrt(self.squared_error(method, params)) if self.curves else None
        return replace(self.layer, method=method, rank=rank, params=params, output_error=expected)


def candidate(layer: LayerPlan, method: Method, curves: Curves | None, multiple: int) -> Candidate | None:
    """The layer as a candidate; None if no method makes it smaller, even at the smallest rank."""
    methods = tuple(
        m
        for m in method.candidates(layer.shape)
        if m.min_params(layer.shape, multiple) + layer.bias_params < layer.dense_params
    )
    known = () if curves is None else tuple(c for c in curves[layer.name] if c.method in methods)
    return Candidate(layer, methods, known, multiple) if methods else None


def uniform(candidates: Sequence[Candidate], weights: Sequence[float], budget: int) -> list[LayerPlan]:
    """Gives each layer a share in proportion to weight × size, with the largest factor that the budget allows.

    A share is at least the smallest form of the layer, and below its dense size.
    """

    def at(scale: float) -> list[LayerPlan]:
        shares = [math.floor(scale * w * c.layer.dense_params) for c, w in zip(candidates, weights, strict=True)]
        # Below dense: with one rate for all, no layer stays dense.
        return [c.within(min(s, c.layer.dense_params - 1)) for c, s in zip(candidates, shares, strict=True)]

    best, low, high = at(0.0), 0.0, 1.0 / min(weights)
    for _ in range(BISECTIONS // 3):
        middle = (low + high) / 2
        tried = at(middle)
        if sum(layer.params for layer in tried) <= budget:
            best, low = tried, middle
        else:
            high = middle
    return _filled(candidates, best, budget)


def overall(candidates: Sequence[Candidate], budget: int) -> list[LayerPlan]:
    """The least sum of weighted squared relative errors within the budget."""
    sizes = np.array([np.linspace(c.minimum, c.layer.dense_params, SIZES).astype(int) for c in candidates])
    errors = np.array([c.weight * c.squared_errors(row) for c, row in zip(candidates, sizes, strict=True)])
    errors[:, -1] = 0  # the last size is the dense layer
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
    """Raises ranks by single steps while the budget allows it, the largest gain first; no layer becomes dense."""
    layers = list(layers)
    left = budget - sum(layer.params for layer in layers)
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


@dataclass(frozen=True)
class _Step:
    """A layer one rank higher, its further parameters, and the gain for each of them."""

    layer: LayerPlan
    cost: int
    gain: float


def _raised(candidate: Candidate, layer: LayerPlan) -> list[_Step]:
    """The layer one rank higher in each entry, if it stays below dense."""
    if layer.method is None or layer.rank is None:
        return []
    ranks = layer.method.raised(layer.shape, layer.rank, candidate.multiple)
    above = [candidate.at(layer.method, rank) for rank in ranks]
    return [
        _Step(row, row.params - layer.params, candidate.weight * _gain(layer, row))
        for row in above
        if row.params < layer.dense_params
    ]


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
    own = {row.name: row.params for row in ranked}
    while True:
        left = budget - sum(row.params for row in dense.values())
        slow = [c for c in candidates if c.layer.name not in dense and _is_slow(c, ranked, is_slow)]
        before = len(dense)
        for one in sorted(slow, key=lambda c: c.layer.dense_params):
            others = [c for c in candidates if c.layer.name not in dense and c is not one]
            rest = left - one.layer.dense_params
            if rest >= max(sum(c.minimum for c in others), KEPT_SHARE * sum(own[c.layer.name] for c in others)):
                dense[one.layer.name] = replace(one.dense(), reason=SLOWER)
                left = rest
        if len(dense) == before:
            return ranked
        others = [c for c in candidates if c.layer.name not in dense]
        ranked = [*dense.values(), *(share_out(others, left) if others else [])]


def _is_slow(candidate: Candidate, ranked: list[LayerPlan], is_slow: Callable[[LayerPlan], bool]) -> bool:
    row = next(row for row in ranked if row.name == candidate.layer.name)
    return row.method is not None and is_slow(row)


def _gain(layer: LayerPlan, above: LayerPlan) -> float:
    """How much one more parameter lowers the expected squared error; without errors, layers of low rate come first."""
    cost = above.params - layer.params
    if layer.output_error is None or above.output_error is None:
        return -layer.params / layer.dense_params
    return (layer.output_error**2 - above.output_error**2) / cost
