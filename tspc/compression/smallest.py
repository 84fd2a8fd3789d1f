"""Finds the smallest network whose drop on held-out inputs is within a limit, with a confidence.

A few networks are tried along the axis of sizes. They share the error curves and what the samples have shown. Their
order is fixed before any of them is judged: the error curves say where it begins, and then the sizes fall by large
steps until a network fails, and from the last one that passed by small steps. Each step tests whether the drop is below
the limit. This is fixed-sequence testing, as in Learn then Test (Angelopoulos et al., arXiv:2110.01052), with one part
of the level for each chain. If a smaller network does not lose less, the chance that the result is above the limit is
at most the level: only the first size of each chain that is above it can be let through by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from scipy import stats
from torch import nn

from tspc.compression.plan import Plan
from tspc.errors import ConfigError, DataError, InfeasibleRateError
from tspc.training.confidence import Drop

FEWEST, MOST = 1000, 6000
"""The number of inputs that test, unless it is given."""
LEAST = 100
"""With fewer held-out inputs nothing is judged."""
MARGIN = 0.2
"""So many inputs test that the bound lies above the mean by about this share of the limit."""
COARSE, FINE = 0.7, 0.92
"""The ratios of sizes that follow each other in the two chains."""
COARSE_LEVEL, FINE_LEVEL, LARGER_LEVEL = 0.1, 0.8, 0.1
"""The shares of the level for the two chains, and for one larger network, in case the first of all fails."""
LARGER = 1.6
"""How much larger that network is."""
ALONE = 0.84
"""The ratio of sizes if there are too few inputs to divide the level among two chains."""
FIRST_LOOK = 0.25, 0.2
"""A test looks first at this share of the inputs, and spends this share of its level on it."""
HOPELESS = 1.5
"""A test ends early if the drop lies so many standard errors above the limit."""
TYPICAL = 100.0
"""Points of top-1 for a squared expected error of 1, of a typical network; the first size comes from it."""
START = 0.25
"""The share of the limit that the network at the first size is expected to lose."""
UNLIKELY = 0.2
"""An estimate is a bound on the drop at this level."""
MADE, NEAR, STEEPNESS = 3, 0.06, 2.0
"""Of the search by estimates: the largest number of networks, how near they come to the size that is sought, as a
share, and the power of the expected error to which the drop is proportional, until two networks show it."""


class Made(Protocol):
    """Makes the network of a plan, in phase 0."""

    def __call__(self, plan: Plan) -> tuple[nn.Module, Plan]: ...


class Judge(Protocol):
    """Compares networks with the reference on held-out inputs, of which there are `count`."""

    count: int
    has_counts: bool
    """Whether each input is right or wrong, so that a loss is −1, 0 or 1."""

    def drop(self, network: nn.Module, start: int, stop: int) -> Drop:
        """The drop on the inputs from `start` to `stop`."""
        ...


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

    def inputs(self, available: int) -> int:
        """How many inputs test, of those that there are.

        Of a top-1 that falls by d, about 2 d + 0.005 of the inputs change between right and wrong.
        """
        if self.images is not None:
            return min(self.images, available)
        share = self.drop / 100
        wanted = float(stats.norm.isf(self.level)) ** 2 * (2 * share + 0.005) / (MARGIN * share) ** 2
        return min(max(FEWEST, math.ceil(wanted)), MOST, available)

    def testing(self, available: int) -> int:
        """How many inputs test the finished network, of those that there are for it and for estimates."""
        return self.inputs(available - (self.estimating(available) if self.is_trained else 0))

    def estimating(self, available: int) -> int:
        """How many inputs estimate the drop before a training; the others test the network after it."""
        return min(MOST // 4, available // 3)


@dataclass
class Tried:
    """A network that was made, at a size as a share of the float32 bytes, and what it loses.

    `expected` is the root mean square of the layers' expected errors. `passed` is None if nothing was tested.
    """

    share: float
    network: nn.Module
    plan: Plan
    expected: float = 0.0
    drop: Drop | None = None
    passed: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        drop = None if self.drop is None else {"points": self.drop.value, "inputs": self.drop.count}
        return {"share": self.share, "bytes": self.plan.network_bytes, "passed": self.passed, "drop": drop}

    def __str__(self) -> str:
        return f"{self.plan.network_bytes:,} bytes ({self.share:.3f})"


@dataclass
class Search:
    """The search for one network. `plan_at` gives the plan for a share of the bytes, `make` its network."""

    plan_at: Callable[[float], Plan]
    make: Made
    judge: Judge
    limit: Limit
    smallest_share: float
    say: Callable[[str], None] = lambda line: None
    tried: dict[float, Tried] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.judge.count < LEAST:
            count = f"{self.judge.count} are too few: give {LEAST} at least"
            raise DataError(f"max_drop={self.limit.drop:g} is judged on held-out inputs, and {count}")

        inputs = self.limit.testing(self.judge.count)
        if self._least_p(inputs) > self.limit.level:
            share, confidence = self.limit.drop / 100, 1 - self.limit.level
            needed = math.ceil(math.log(self.limit.level) / math.log(1 - share))
            raise ConfigError(
                [
                    f"max_drop={self.limit.drop:g} needs {needed:,} held-out inputs at confidence {confidence:g}, and "
                    f"{inputs:,} can test; give more of them, a larger max_drop, or a smaller confidence"
                ]
            )

    def _least_p(self, inputs: int) -> float:
        """The p-value if nothing at all is lost on so many inputs."""
        if not self.judge.has_counts:
            return 0.0
        return Drop(inputs, 0.0, 0.0, 100.0, 0, 0).p_value(self.limit.drop)

    def run(self) -> Tried:
        """The smallest network that keeps the limit. Raises ConfigError if none does; it names the nearest limit."""
        found = self._by_estimates() if self.limit.is_trained else self._by_tests()
        if found.share > self.limit.share:
            both = f"max_drop={self.limit.drop:g} and a size of {self.limit.share:.4g} of the bytes cannot both be met"
            raise ConfigError([f"{both}: the smallest network within the drop has {found}"])
        return found

    def judged(self, one: Tried) -> dict[str, Any]:
        """What the held-out inputs said of the networks that were tried, and of the chosen one; plain data."""
        bound = None if one.drop is None or one.passed is None else one.drop.bound(self.limit.level)
        found = {"max_drop": self.limit.drop, "confidence": 1 - self.limit.level, "bound": bound}
        tried = [each.to_dict() for each in sorted(self.tried.values(), key=lambda each: -each.share)]
        return found | one.to_dict() | {"is_exact": one.drop is not None and one.drop.is_exact, "tried": tried}

    # By tests: the network is finished.

    def _by_tests(self) -> Tried:
        start = self._share_for(math.sqrt(START * self.limit.drop / TYPICAL))
        if self._least_p(self.limit.inputs(self.judge.count)) > COARSE_LEVEL / 2 * self.limit.level:
            best = self._chain(start, ALONE, 1.0) or self._made(start)
            if not best.passed:
                raise ConfigError([self._refusal(best)])
            return best
        best = self._chain(start, COARSE, COARSE_LEVEL)
        failed = start if best is None else best.share * COARSE
        if best is None:
            best = self._made(min(LARGER * start, 1.0))
            if not self._passes(best, LARGER_LEVEL):
                raise ConfigError([self._refusal(best)])
        return self._chain(best.share * FINE, FINE, FINE_LEVEL, failed) or best

    def _chain(self, start: float, ratio: float, part: float, stop: float = 0.0) -> Tried | None:
        """The last network that passes, of sizes that fall from `start` until one fails; None if the first one does."""
        best, share = None, max(start, self.smallest_share)
        while best is None or (best.share > self.smallest_share and share > 0.98 * stop):
            one = self._made(share)
            if not self._passes(one, part):
                break
            best, share = one, max(share * ratio, self.smallest_share)
        return best

    def _passes(self, one: Tried, part: float) -> bool:
        """Whether the drop is below the limit at this part of the level. There are two looks, or one if it is clear."""
        level, count = part * self.limit.level, self.limit.inputs(self.judge.count)
        first, spent = FIRST_LOOK
        looks = [(int(count * first), spent * level), (count, (1 - spent) * level)]
        is_useful = self._least_p(looks[0][0]) <= looks[0][1] and looks[0][0] >= LEAST
        for inputs, at in looks if is_useful else [(count, level)]:
            one.drop = self.judge.drop(one.network, 0, inputs)
            one.passed = one.drop.p_value(self.limit.drop) <= at
            if one.passed or one.drop.value - HOPELESS * one.drop.points * one.drop.error > self.limit.drop:
                break
        assert one.drop is not None
        verdict = "passes" if one.passed else "does not pass"
        self.say(f"{one} loses {one.drop.value:.2f} points on {one.drop.count:,} held-out inputs: {verdict}")
        return bool(one.passed)

    def _refusal(self, one: Tried) -> str:
        assert one.drop is not None
        bound = math.ceil(100 * one.drop.bound(self.limit.level)) / 100
        return (
            f"max_drop={self.limit.drop:g} cannot be shown with confidence {1 - self.limit.level:g} on "
            f"{one.drop.count:,} held-out inputs: the network at {one.share:.3g} of the bytes loses "
            f"{one.drop.value:.2f} points, at most {bound:g}; give max_drop={bound:g}, or more inputs"
        )

    # By estimates: the network will be trained.

    def _by_estimates(self) -> Tried:
        """The network that is expected to lose the limit after its training."""
        share = self._share_for(math.sqrt(self.limit.drop / TYPICAL))
        while True:
            one = self._made(share)
            if one.drop is None:
                one.drop = self.judge.drop(one.network, 0, self.limit.estimating(self.judge.count))
                inputs = f"{one.drop.count:,} held-out inputs"
                self.say(f"{one} loses {one.drop.value:.2f} points on {inputs} before training")
            share = self._next_guess()
            nearest = min(self.tried, key=lambda known: abs(math.log(known / share)))
            if abs(math.log(nearest / share)) < NEAR:
                return self.tried[nearest]
            if len(self.tried) == MADE:
                return self._made(share)

    def _next_guess(self) -> float:
        """The share at which the drop after the training is expected to be the limit."""
        # Of few inputs the mean is too uncertain: what is likely is within a bound.
        likely = {one.expected: one.drop.bound(UNLIKELY) for one in self.tried.values() if one.drop}
        drops = {error: self.limit.given_back(drop) for error, drop in likely.items()}
        points = sorted((error, max(drop, self.limit.drop / 20)) for error, drop in drops.items())
        (low, small), (high, large) = points[0], points[-1]
        power = STEEPNESS
        if high > low and large > small:
            power = min(max(math.log(large / small) / math.log(high / low), 1.0), 4.0)
        error, drop = min(points, key=lambda point: abs(math.log(point[1] / self.limit.drop)))
        return self._share_for(error * (self.limit.drop / drop) ** (1 / power))

    # Networks by size.

    def _made(self, share: float) -> Tried:
        near = [known for known in self.tried if abs(math.log(known / share)) < 1e-6]
        if not near:
            plan = self.plan_at(share)
            network, done = self.make(plan)
            self.tried[share] = Tried(share, network, done, plan.output_error or 0.0)
        return self.tried[near[0] if near else share]

    def _share_for(self, error: float) -> float:
        """The share at which the layers' errors are expected to have this root mean square."""
        low, high = self.smallest_share, 1.0
        for _ in range(12):
            middle = math.sqrt(low * high)
            try:
                is_worse = (self.plan_at(middle).output_error or 0.0) > error
            except InfeasibleRateError:
                is_worse = True
            low, high = (middle, high) if is_worse else (low, middle)
        return high
