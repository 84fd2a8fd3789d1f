"""One budget of parameters shared out over the layers of a network.

- `uniform`: every layer the same rate (or one that follows the depth), as in arXiv:1805.10352;
- `overall`, called `global` in the settings: the least sum of the layers' weighted squared relative errors. Each
  layer takes the size, and the method if there are several, that minimises error + λ·parameters, with keeping the
  layer dense among the choices; λ is the one at which the sum meets the budget (Shoham & Gersho, IEEE TASSP 1988).

What rounding to whole ranks leaves over is then given out in single ranks, so that no further rank would fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from tspc.compression.curves import Curves, ErrorCurve
from tspc.compression.plan import SLOWER, LayerPlan
from tspc.decompositions import Decomposition, Method, Rank, Shape

ALLOCATIONS = ("global", "uniform")
BISECTIONS = 100
KEPT_SHARE = 0.5
"""Share of their parameters that layers keep at least when others stay dense for the sake of speed."""
SIZES = 96
"""Sizes between the smallest form and the dense layer that the global allocation chooses from."""


@dataclass(frozen=True)
class Candidate:
    """A layer that shares the budget: what it may become, and the curves of these methods where they are known."""

    layer: LayerPlan
    methods: tuple[Decomposition, ...]
    curves: tuple[ErrorCurve, ...]
    multiple: int

    @property
    def minimum(self) -> int:
        """Parameters of its smallest form."""
        return min(self._smallest(method) for method in self.methods)

    @property
    def weight(self) -> float:
        return self.curves[0].weight if self.curves else 1.0

    def _smallest(self, method: Decomposition) -> int:
        return method.min_params(self.layer.shape, self.multiple) + self.layer.bias_params

    def error(self, method: Decomposition, params: int) -> float:
        """Expected squared relative error with so many parameters, bias included."""
        curve = next(c for c in self.curves if c.method == method)
        return curve.at(params - self.layer.bias_params)

    def best(self, share: int) -> Decomposition:
        """The method with the least expected error within a share."""
        fitting = [m for m in self.methods if self._smallest(m) <= share]
        return fitting[0] if len(fitting) == 1 else min(fitting, key=lambda m: self.error(m, share))

    def within(self, share: int) -> LayerPlan:
        """The layer at the largest rank that a share allows; dense if it has room for that."""
        if share >= self.layer.dense_params:
            return self.dense()
        share = max(share, self.minimum)
        method = self.best(share)
        return self.at(method, _rank_for(method, self.layer.shape, share - self.layer.bias_params, self.multiple))

    def dense(self) -> LayerPlan:
        return replace(self.layer, output_error=0.0)

    def at(self, method: Decomposition, rank: Rank) -> LayerPlan:
        params = method.num_params(self.layer.shape, rank) + self.layer.bias_params
        expected = math.sqrt(self.error(method, params)) if self.curves else None
        return replace(self.layer, method=method, rank=rank, params=params, output_error=expected)


def candidate(layer: LayerPlan, method: Method, curves: Curves | None, multiple: int) -> Candidate | None:
    """What the layer may become; None if no method at its smallest rank would make it smaller."""
    methods = tuple(
        m
        for m in method.candidates(layer.shape)
        if m.min_params(layer.shape, multiple) + layer.bias_params < layer.dense_params
    )
    known = () if curves is None else tuple(c for c in curves[layer.name] if c.method in methods)
    return Candidate(layer, methods, known, multiple) if methods else None


@lru_cache(maxsize=65536)
def _rank_for(method: Decomposition, shape: Shape, budget: int, multiple: int) -> Rank:
    return method.rank_for(shape, budget, multiple)


def uniform(candidates: Sequence[Candidate], weights: Sequence[float], budget: int) -> list[LayerPlan]:
    """The largest common factor on weight × size at which all layers together keep to the budget.

    Each layer's share lies between its smallest form and its dense size.
    """

    def at(scale: float) -> list[LayerPlan]:
        shares = [math.floor(scale * w * c.layer.dense_params) for c, w in zip(candidates, weights, strict=True)]
        # One less than dense: an equal rate for all keeps no layer as it is.
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
    errors = np.array([_errors(c, row) for c, row in zip(candidates, sizes, strict=True)])
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


def _errors(candidate: Candidate, sizes: np.ndarray) -> list[float]:
    """Least expected error over the methods, weighted, at each size; 0 at the last one, which is the dense layer."""
    inner = [candidate.weight * candidate.error(candidate.best(int(size)), int(size)) for size in sizes[:-1]]
    return [*inner, 0.0]


def _filled(candidates: Sequence[Candidate], layers: list[LayerPlan], budget: int) -> list[LayerPlan]:
    """Raises single ranks, of layers that stay below dense, as long as the budget allows; the largest gain first."""
    layers = list(layers)
    left = budget - sum(layer.params for layer in layers)
    while True:
        steps = [
            (c.weight * _gain(layer, above), -i, above)
            for i, (c, layer) in enumerate(zip(candidates, layers, strict=True))
            if (above := _next(c, layer, left)) is not None
        ]
        if not steps:
            return layers
        _, index, above = max(steps, key=lambda step: step[:2])
        left -= above.params - layers[-index].params
        layers[-index] = above


def _next(candidate: Candidate, layer: LayerPlan, left: int) -> LayerPlan | None:
    """The layer one rank up, if that needs at most `left` more parameters and stays below dense."""
    if layer.method is None or layer.rank is None:
        return None
    for rank in layer.method.raised(layer.shape, layer.rank, candidate.multiple):
        above = candidate.at(layer.method, rank)
        if above.params <= min(layer.params + left, layer.dense_params - 1):
            return above
    return None


def without_slower(
    candidates: Sequence[Candidate],
    budget: int,
    ranked: list[LayerPlan],
    share_out: Callable[[Sequence[Candidate], int], list[LayerPlan]],
    is_slow: Callable[[LayerPlan], bool],
) -> list[LayerPlan]:
    """The rows of an allocation, but layers that tensorization does not make faster stay dense.

    Small ones come first, and only while the others keep `KEPT_SHARE` of what they have. `share_out` makes an
    allocation of some layers under a budget.
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
    """Fall of the expected squared error for each parameter; of the rate, where no error is known."""
    cost = above.params - layer.params
    if layer.output_error is None or above.output_error is None:
        return -layer.params / layer.dense_params
    return (layer.output_error**2 - above.output_error**2) / cost
