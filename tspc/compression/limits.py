"""A limit on the drop, and how many held-out inputs judge it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import stats

FEWEST, MOST = 1000, 6000
"""The number of inputs that test, unless it is given."""
PILOT = 1000
"""Inputs of the pilot; at most a quarter of all."""
MARGIN = 0.2
"""So many inputs test that the bound lies above the mean by about this share of the limit."""


@dataclass(frozen=True)
class Limit:
    """The largest drop in points, the level (one minus the confidence), and the number of inputs that test, if given.

    The network may have at most `share` of the float32 bytes. With `is_trained` it will be trained further, so nothing
    is tested now. `given_back` tells the drop after this training from the drop before it.
    """

    drop: float
    level: float
    images: int | None = None
    share: float = 1.0
    is_trained: bool = False
    given_back: Callable[[float], float] = lambda drop: drop

    def parts(self, available: int) -> tuple[int, int]:
        """How many of the inputs are the pilot, and how many of the others test."""
        pilot = min(PILOT, available // 4)
        if self.images is not None:
            return pilot, min(self.images, available - pilot)
        share = self.drop / 100
        wanted = float(stats.norm.isf(self.level)) ** 2 * changed(share) / (MARGIN * share) ** 2
        return pilot, min(max(FEWEST, math.ceil(wanted)), MOST, available - pilot)


def changed(drop: float) -> float:
    """About which share of the inputs changes between right and wrong where top-1 falls by this share."""
    return 2 * drop + 0.005
