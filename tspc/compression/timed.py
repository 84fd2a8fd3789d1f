"""Divides a budget of time, and optionally one of size, among the layers of a network.

Every layer takes one of its options: dense, or a form at one of several ranks. The sum of the weighted squared errors
is to be the least under both limits. Each layer takes the option that minimises error + λ·seconds + μ·size (Shoham &
Gersho, IEEE TASSP 1988, with two prices). Bisections find the prices. Single steps then spend what is left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tspc.compression.allocation import Candidate
from tspc.compression.form import DENSE
from tspc.compression.plan import LayerPlan

SIZES = 64
"""The number of ranks of each form, from the smallest size to the dense one."""
STEPS = 48
"""Bisections for a price."""
FILLED = 4
"""So many choices are filled up; the best one counts."""
LOWEST, HIGHEST = 1e-12, 1e9
"""Prices, in errors for the whole budget."""


@dataclass(frozen=True)
class Option:
    """What a layer may become, on a path: its weighted squared error, its time for a batch, its size with the bias."""

    row: LayerPlan
    error: float
    seconds: float
    size: int


def options_of(
    candidate: Candidate, seconds: Callable[[LayerPlan], float], on_path: Callable[[LayerPlan], LayerPlan]
) -> list[Option]:
    """The options of a layer, the dense one first.

    `on_path` gives a tensorized row its fastest path, and `seconds` the time of a row. An option that is slower than
    the dense layer is left out. So is one that is no better than another one in anything.
    """
    unit, slowest = candidate.unit, seconds(candidate.dense())
    found = [Option(candidate.dense(), candidate.weight * candidate.least_error, slowest, candidate.dense_size)]
    known: dict[object, tuple[LayerPlan, float]] = {}
    for form in candidate.forms:
        ranks = {(): None} if form.method == DENSE else {}
        if form.method != DENSE:
            sizes = np.geomspace(candidate.smallest[form], candidate.dense_size, SIZES).astype(int) - candidate.bias
            ranks = dict.fromkeys(form.rank_for(candidate.layer, int(x), candidate.multiple) for x in sizes)
        for rank in ranks:
            row = candidate.at(form, rank)
            if row.size(unit) >= candidate.dense_size:
                continue
            if (form.method, rank) not in known:
                placed = on_path(row)
                known[form.method, rank] = placed, seconds(placed)
            placed, time = known[form.method, rank]
            if time <= slowest:
                error = candidate.weight * (row.output_error or 0.0) ** 2
                found.append(Option(_moved(row, placed), error, time, row.size(unit)))
    return [found[0], *_best(found[1:])]


def _moved(row: LayerPlan, placed: LayerPlan) -> LayerPlan:
    return replace(row, path=placed.path)


def _best(options: Sequence[Option]) -> list[Option]:
    """Those that no other one beats in everything."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda x: (x.error, x.seconds, x.size)):
        if not any(other.seconds <= option.seconds and other.size <= option.size for other in kept):
            kept.append(option)
    return kept


class Allocation:
    """The options of all layers; `at` chooses among them."""

    def __init__(self, options: Sequence[Sequence[Option]]) -> None:
        self.options = options
        longest = max(map(len, options))
        self._errors, self._seconds, self._sizes = (
            np.array([[getattr(x, key) for x in row] + [math.inf] * (longest - len(row)) for row in options])
            for key in ("error", "seconds", "size")
        )
        self._rows = np.arange(len(options))
        self._dense = float(self._seconds[:, 0].sum()) or 1.0

    @property
    def dense_seconds(self) -> float:
        """The time of all layers if they stay dense."""
        return float(self._seconds[:, 0].sum())

    def fastest(self, size: float = math.inf) -> float:
        """The least time within a size; infinite if the size itself cannot be met."""
        found = self._within(self._seconds / self._dense, self._sizes, size)
        return math.inf if found is None else self._total(self._seconds, found)

    def at(self, seconds: float, size: float = math.inf) -> list[Option] | None:
        """The options with the least error within both limits; None if there are none."""
        choice = self._choice(seconds * (1 + 1e-9), size)
        return None if choice is None else [row[i] for row, i in zip(self.options, choice, strict=True)]

    def _total(self, values: np.ndarray, choice: np.ndarray) -> float:
        return float(values[self._rows, choice].sum())

    def _within(self, costs: np.ndarray, values: np.ndarray, limit: float) -> np.ndarray | None:
        """The least costs of which the values keep a limit: an option for each layer. None if none does."""
        if math.isinf(limit):
            return _least(costs, values)
        smallest = _least(values, costs)
        if self._total(values, smallest) > limit:
            return None
        free = _least(costs, values)
        if self._total(values, free) <= limit:
            return free
        best, low, high = smallest, LOWEST, HIGHEST
        scaled = np.where(np.isinf(values), np.inf, values / max(limit, 1e-300))
        for _ in range(STEPS):
            price = math.sqrt(low * high)
            choice = _least(costs + price * scaled, values)
            if self._total(values, choice) <= limit:
                best, high = choice, price
            else:
                low = price
        return best

    def _choice(self, seconds: float, size: float) -> np.ndarray | None:
        fastest = self._within(self._seconds, self._sizes, size)
        if fastest is None or self._total(self._seconds, fastest) > seconds:
            return None
        free = self._within(self._errors, self._sizes, size)
        assert free is not None
        found = [fastest]
        if self._total(self._seconds, free) <= seconds:
            found.append(free)
        else:
            found += self._priced(seconds, size)
        filled = [self._filled(choice, seconds, size) for choice in found]
        return min(filled, key=lambda choice: self._total(self._errors, choice))

    def _priced(self, seconds: float, size: float) -> list[np.ndarray]:
        """Choices by the price of time within the limit, the last ones of a bisection."""
        low, high, best = LOWEST, HIGHEST, []
        scaled = np.where(np.isinf(self._seconds), np.inf, self._seconds / max(seconds, 1e-300))
        for _ in range(STEPS):
            price = math.sqrt(low * high)
            choice = self._within(self._errors + price * scaled, self._sizes, size)
            if choice is not None and self._total(self._seconds, choice) <= seconds:
                high = price
                if not best or (choice != best[-1]).any():
                    best.append(choice)
            else:
                low = price
        return best[-FILLED:]

    def _filled(self, choice: np.ndarray, seconds: float, size: float) -> np.ndarray:
        """Changes one layer at a time for a smaller error within both limits, the largest gain for its costs first."""
        choice = choice.copy()
        bound = size if math.isfinite(size) else float(self._sizes[:, 0].sum())
        while True:
            error, time, own = (
                values - values[self._rows, choice][:, None] for values in (self._errors, self._seconds, self._sizes)
            )
            left = seconds - self._total(self._seconds, choice), size - self._total(self._sizes, choice)
            fits = (error < -1e-15) & (time <= left[0]) & (own <= left[1])
            if not fits.any():
                return choice
            costs = np.maximum(time, 0.0) / max(seconds, 1e-300) + np.maximum(own, 0.0) / max(bound, 1.0)
            gains = np.where(fits, -error, 0.0) / np.where(fits, costs + 1e-9, 1.0)
            layer, option = np.unravel_index(int(gains.argmax()), gains.shape)
            choice[layer] = option


def _least(costs: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """For each layer the option of the least costs; among equals the one with the least of `ties`."""
    least = costs.min(axis=1, keepdims=True)
    return np.where(costs <= least, ties, math.inf).argmin(axis=1)
