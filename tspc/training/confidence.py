"""Whether the drop of a metric is within a limit, with a confidence: tests of paired differences.

Both networks answer the same inputs. The loss of an input is the reference's score minus the compressed network's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, gammaln, stdtr, xlogy
from torch import Tensor

NUISANCE = 1e-4
"""The level that is spent on how often inputs gain."""
GRID = 17
"""Values of that frequency that are tried."""
REACH = 7.0
"""So many standard deviations around the mean hold all but a part of 1e-11 of the counts."""
HALVINGS = 16


@dataclass(frozen=True)
class Drop:
    """The losses of some inputs, or of groups of them: their mean, in points, and how it was found.

    `count` is the number of losses, of so many `inputs`. `points` are those of one unit of loss. `lost` and `gained`
    count inputs with a loss of 1 and −1 if each input is right or wrong; else they are None. `deviation` is the
    standard deviation of a loss.
    """

    count: int
    mean: float
    deviation: float
    points: float = 1.0
    lost: int | None = None
    gained: int | None = None
    inputs: int = 0

    @classmethod
    def of(cls, losses: Tensor, points: float = 1.0, *, is_counted: bool = False, inputs: int | None = None) -> Drop:
        """From losses (N,), in units of which one is so many points; with `is_counted` each of them is −1, 0 or 1."""
        values = losses.detach().double().cpu().numpy()
        deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        counts = (int((values > 0).sum()), int((values < 0).sum())) if is_counted else (None, None)
        return cls(len(values), float(values.mean()), deviation, points, *counts, inputs or len(values))

    @property
    def is_exact(self) -> bool:
        """Whether the bound holds at any number of inputs; else it is that of Student's t."""
        return self.lost is not None

    @property
    def value(self) -> float:
        """The mean loss, in points."""
        return self.points * self.mean

    def p_value(self, limit: float) -> float:
        """The largest probability of so small a mean if the true drop is `limit` points, or more.

        Exact for losses of −1, 0 and 1: the number of lost and gained inputs is multinomial. How often inputs gain is
        not known; the worst value of a confidence interval is taken, and its level is added (Berger and Boos, JASA
        1994). Counts are ordered by the score statistic, which hardly depends on that frequency (Tango, Statistics in
        Medicine 1998). Other losses: the one-sided t-test.
        """
        asked = limit / self.points
        if self.lost is None or self.gained is None:
            # Few losses may be equal by chance: their deviation is not believed to be below a quarter of the limit.
            error = max(self.deviation, abs(asked) / 4, 1e-300) / math.sqrt(self.count)
            return float(stdtr(max(self.count - 1, 1), (self.mean - asked) / error))
        return _exact(self.lost, self.gained, self.count, asked)

    def bound(self, level: float) -> float:
        """The upper confidence bound on the drop, in points: the smallest limit whose p-value is at most `level`."""
        low, high = self.mean, 1.0
        if not self.is_exact:
            high = abs(self.mean) + 4 * self.deviation + 1e-9
            while self.p_value(high * self.points) > level and high < 1e30:
                high *= 2
        for _ in range(HALVINGS if self.is_exact else 3 * HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.p_value(middle * self.points) <= level else (middle, high)
        return self.points * high

    @property
    def error(self) -> float:
        """The standard error of the mean, in units of loss."""
        return self.deviation / math.sqrt(self.count)


def _exact(lost: int, gained: int, count: int, limit: float) -> float:
    if not -1 < limit < 1:
        return 1.0 if limit <= -1 else 0.0
    top = (1 - limit) / 2  # both frequencies together are at most 1
    ends = betaincinv((gained, gained + 1), (count - gained + 1, count - gained), (NUISANCE / 2, 1 - NUISANCE / 2))
    low, high = (min(max(float(end), 0.0, -limit), top) for end in np.nan_to_num(ends))
    lows, highs = (low, low + limit), (high, high + limit)
    gains, losses = (_window(a, b, count) for a, b in zip(lows, highs, strict=True))
    below = _score(losses[:, None], gains[None], count, limit) <= _score(lost, gained, count, limit) + 1e-9
    rest = count - losses[:, None] - gains[None]
    below &= rest >= 0
    rest = np.maximum(rest, 0)
    ways = gammaln(count + 1) - gammaln(losses + 1)[:, None] - gammaln(gains + 1)[None] - gammaln(rest + 1)

    def tail(gain: float) -> float:
        """The probability of the counts that are as extreme, if an input gains with this frequency."""
        logs = ways + xlogy(losses, gain + limit)[:, None] + xlogy(gains, gain)[None]
        return float(np.exp(logs + xlogy(rest, 1 - 2 * gain - limit))[below].sum())

    return min(1.0, max(tail(float(gain)) for gain in np.linspace(low, high, GRID)) + NUISANCE)


def _window(low: float, high: float, count: int) -> np.ndarray:
    """The counts that occur at frequencies from `low` to `high`."""
    spread = [REACH * math.sqrt(count * p * (1 - p)) + REACH for p in (low, high)]
    return np.arange(max(0, math.floor(count * low - spread[0])), min(count, math.ceil(count * high + spread[1])) + 1)


def _score(lost: np.ndarray | int, gained: np.ndarray | int, count: int, limit: float) -> np.ndarray:
    """The score statistic of a drop of `limit`: how many standard errors the drop lies above it."""
    b = -(lost + gained) + (2 * count - lost + gained) * limit
    c = -gained * limit * (1 - limit)
    gain = (np.sqrt(np.maximum(b * b - 8 * count * c, 0)) - b) / (4 * count)  # the likeliest one
    variance = count * (2 * gain + limit * (1 - limit))
    return (lost - gained - count * limit) / np.sqrt(np.maximum(variance, 1e-12))
