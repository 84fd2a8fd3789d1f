"""A limit on the drop, and how many held-out inputs judge it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.special import ndtri

from tspc.errors import ConfigError, DataError
from tspc.training.confidence import Drop

FEWEST, MOST = 1000, 6000
"""The number of inputs that test, unless it is given."""
PILOT = 1000
"""Inputs of the pilot; at most a quarter of all."""
LEAST = 100
"""With fewer held-out inputs nothing is judged."""
MARGIN = 0.2
"""So many inputs test that the bound lies above the mean by about this share of the limit."""


@dataclass(frozen=True)
class Limit:
    """The largest drop in points, the level (one minus the confidence), and the number of inputs that test, if given.

    The network may have at most `share` of its bytes before. With `is_trained` it will be trained further, so nothing
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
        pilot = pilot_of(available)
        if self.images is not None:
            return pilot, min(self.images, available - pilot)
        share = self.drop / 100
        wanted = float(ndtri(self.level)) ** 2 * changed(share) / (MARGIN * share) ** 2
        return pilot, min(max(FEWEST, math.ceil(wanted)), MOST, available - pilot)

    def least_p(self, inputs: int) -> float:
        """The p-value if nothing at all is lost on so many inputs, each of which is right or wrong."""
        return Drop(inputs, 0.0, 0.0, 100.0, 0, 0).p_value(self.drop)

    def check(self, available: int, has_counts: bool) -> None:
        """Raises DataError or ConfigError if so many held-out inputs cannot show the limit, whatever is lost."""
        if available < LEAST:
            count = f"{available} are too few: give {LEAST} at least"
            raise DataError(f"max_drop={self.drop:g} is judged on held-out inputs, and {count}")
        inputs = self.parts(available)[1]
        if has_counts and self.least_p(inputs) > self.level:
            needed = math.ceil(math.log(self.level) / math.log(1 - self.drop / 100))
            raise ConfigError(
                [
                    f"max_drop={self.drop:g} needs {needed:,} held-out inputs at confidence {1 - self.level:g}, and "
                    f"{inputs:,} can test; give more of them, a larger max_drop, or a smaller confidence"
                ]
            )


def pilot_of(available: int) -> int:
    """How many of the held-out inputs are the pilot."""
    return min(PILOT, available // 4)


def changed(drop: float) -> float:
    """About which share of the inputs changes between right and wrong where top-1 falls by this share."""
    return 2 * drop + 0.005
