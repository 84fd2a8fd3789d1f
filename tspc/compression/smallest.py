"""Finds the smallest network whose drop on held-out inputs is within a limit, with a confidence.

A few networks are tried along the axis of sizes, and all share the error curves and what the samples have shown. The
held-out inputs are divided. The first ones, the *pilot*, show how the drop grows as networks become smaller. From this
a sequence of sizes is fixed, from larger to smaller. The other inputs then test one size after the other, each at the
whole level, and the first one that fails ends the sequence. As the sequence does not depend on these inputs, the chance
that any network is let through whose true drop is above the limit is at most the level (fixed-sequence testing, as in
Learn then Test, Angelopoulos et al., arXiv:2110.01052).
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

PILOT = 1500
"""Inputs of the pilot; at most a third of the held-out ones."""
FEWEST, MOST = 1000, 10_000
"""The number of inputs that test, unless it is given."""
MARGIN = 0.2
"""So many inputs test that the bound lies above the mean by about this share of the limit."""
STEP = 0.93
"""The ratio of sizes that follow each other in the sequence."""
TESTS = 4
"""The largest number of sizes in the sequence."""
PILOTS = 3
"""The largest number of networks that the pilot judges."""
NEAR = 0.12
"""The pilot knows enough if a network that it has judged has a size so near to the one sought, as a share."""
FIRST_LOOK = 0.25, 0.2
"""A test looks first at this share of the inputs, and spends this share of its level on it."""
MAIN = 0.9
"""The share of the level for the sequence; the rest is for one larger network, in case the first test fails."""
RESCUE = 1.35
"""How much larger that network is."""
STEEPNESS = 2.0
"""The drop is about proportional to this power of the expected error, until two networks show the power."""
TYPICAL = 0.01
"""Points of top-1 for a squared expected error of 1e-4, of a typical network. The first guess comes from it."""


class Made(Protocol):
    """Makes the network of a plan, in phase 0."""

    def __call__(self, plan: Plan) -> tuple[nn.Module, Plan]: ...


class Judge(Protocol):
    """Compares networks with the reference on held-out inputs, of which there are `count`."""

    count: int

    def drop(self, network: nn.Module, start: int, stop: int) -> Drop:
        """The drop on the inputs from `start` to `stop`."""
        ...


@dataclass(frozen=True)
class Limit:
    """The largest drop in points, the level (one minus the confidence), and the number of inputs that test, if given.

    With `is_trained` the network will be trained further, so nothing is tested now. `given_back` tells the drop after
    this training from the drop before it.
    """

    drop: float
    level: float
    images: int | None = None
    is_trained: bool = False
    given_back: Callable[[float], float] = lambda drop: drop


@dataclass
class Tried:
    """A network that was made, at a size as a share of the float32 bytes, and the drops that were found."""

    share: float
    network: nn.Module
    plan: Plan
    pilot: Drop | None = None
    tested: Drop | None = None
    passed: bool | None = None

    @property
    def error(self) -> float:
        """The root mean square of the layers' expected errors at this size."""
        return self.expected

    expected: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        drops = {"pilot": self.pilot, "drop": self.tested}
        found = {key: {"points": drop.value, "inputs": drop.count} for key, drop in drops.items() if drop is not None}
        return {"share": self.share, "bytes": self.plan.network_bytes, "passed": self.passed} | found


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
        self.pilot = min(PILOT, self.judge.count // 3)
        if self.pilot < 30:
            raise DataError(
                f"max_drop={self.limit.drop:g} is judged on held-out inputs, and there are {self.judge.count}: give more"
            )

    def run(self) -> Tried:
        """The smallest network that keeps the limit. Raises ConfigError if none does; it names the nearest limit."""
        wanted = self._by_pilot()
        return wanted if self.limit.is_trained else self._tested(wanted.share)

    # The pilot.

    def _by_pilot(self) -> Tried:
        """The network whose size the pilot finds to be the smallest within the limit."""
        share = self._share_for(math.sqrt(TYPICAL * self.limit.drop))
        judged: list[Tried] = []
        while True:
            judged.append(self._judged(share))
            share = self._best_guess(judged)
            nearest = min(judged, key=lambda one: abs(math.log(one.share / share)))
            if len(judged) == PILOTS or abs(math.log(nearest.share / share)) < NEAR:
                return nearest if abs(math.log(nearest.share / share)) < 0.02 else self._made(share)

    def _judged(self, share: float) -> Tried:
        one = self._made(share)
        if one.pilot is None:
            one.pilot = self.judge.drop(one.network, 0, self.pilot)
            self.say(f"{_size(one)} loses {one.pilot.value:.2f} points on {self.pilot:,} inputs of the pilot")
        return one

    def _best_guess(self, judged: list[Tried]) -> float:
        """The share at which the bound on the drop is expected to reach the limit."""
        points = sorted((one.expected, max(_after(self.limit, one), self.limit.drop / 20)) for one in judged)
        power = STEEPNESS
        if len(points) > 1 and points[-1][0] > points[0][0]:
            (low, small), (high, large) = points[0], points[-1]
            power = min(max(math.log(large / small) / math.log(high / low), 1.0), 4.0)
        error, drop = min(points, key=lambda point: abs(math.log(point[1] / self._aim(judged))))
        return self._share_for(error * (self._aim(judged) / drop) ** (1 / power))

    def _aim(self, judged: list[Tried]) -> float:
        """The drop whose bound would be the limit."""
        known = [one.pilot for one in judged if one.pilot is not None]
        last = min(known, key=lambda drop: abs(drop.value - self.limit.drop))
        deviation = last.points * max(last.deviation, math.sqrt(1 / last.count))
        room = stats.norm.isf(self.limit.level) * deviation / math.sqrt(self._inputs(last))
        return max(self.limit.drop - float(room), 0.15 * self.limit.drop)

    def _inputs(self, pilot: Drop) -> int:
        """How many inputs test."""
        most = self.judge.count - self.pilot
        if self.limit.images is not None:
            return min(self.limit.images, most)
        wanted = stats.norm.isf(self.limit.level) * pilot.points * pilot.deviation / (MARGIN * self.limit.drop)
        return min(max(FEWEST, math.ceil(float(wanted) ** 2)), MOST, most)

    # The sequence.

    def _tested(self, share: float) -> Tried:
        known = [one for one in self.tried.values() if one.pilot is not None]
        nearest = min(known, key=lambda one: abs(math.log(one.share / share)))
        assert nearest.pilot is not None
        count = self._inputs(nearest.pilot)
        best: Tried | None = None
        for number in range(TESTS):
            one = self._made(self._settled(share * STEP ** (number - 1)))
            if one.passed is None:
                self._test(one, count, MAIN * self.limit.level)
            if not one.passed:
                break
            best = one
            if one.share <= self.smallest_share:
                break
        if best is None:
            best = self._made(self._settled(share * RESCUE))
            if not self._test(best, count, (1 - MAIN) * self.limit.level):
                raise ConfigError([self._refusal(best)])
        return best

    def _settled(self, share: float) -> float:
        """A share between the smallest one and 1; that of a network which was made already, if it is as good."""
        share = min(max(share, self.smallest_share), 1.0)
        near = [known for known in self.tried if abs(math.log(known / share)) < 0.02]
        return near[0] if near else share

    def _test(self, one: Tried, count: int, level: float) -> bool:
        """Whether the drop is below the limit at this level, by two looks. A network far above it is not looked at again."""
        first, spent = FIRST_LOOK
        looks = [(count, level)]
        if count * first >= FEWEST / 4:
            looks = [(int(count * first), spent * level), (count, (1 - spent) * level)]
        for inputs, at in looks:
            one.tested = self.judge.drop(one.network, self.pilot, self.pilot + inputs)
            one.passed = one.tested.p_value(self.limit.drop) <= at
            if one.passed or one.tested.value > self.limit.drop:
                break
        assert one.tested is not None
        verdict = "passes" if one.passed else "does not pass"
        self.say(f"{_size(one)} loses {one.tested.value:.2f} points on {one.tested.count:,} held-out inputs: {verdict}")
        return bool(one.passed)

    def _refusal(self, one: Tried) -> str:
        assert one.tested is not None
        bound = one.tested.bound(self.limit.level)
        return (
            f"max_drop={self.limit.drop:g} cannot be shown with confidence {1 - self.limit.level:g} on "
            f"{one.tested.count:,} held-out inputs: the network at {one.share:.3g} of the bytes loses "
            f"{one.tested.value:.2f} points, at most {bound:.2f}; give max_drop={math.ceil(100 * bound) / 100:g}, or more "
            "inputs"
        )

    # Networks by size.

    def _made(self, share: float) -> Tried:
        if share not in self.tried:
            plan = self.plan_at(share)
            network, done = self.make(plan)
            self.tried[share] = Tried(share, network, done, expected=plan.output_error or 0.0)
        return self.tried[share]

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


def _after(limit: Limit, one: Tried) -> float:
    """The drop that the pilot lets expect, after the training if there is one."""
    assert one.pilot is not None
    return limit.given_back(one.pilot.value) if limit.is_trained else one.pilot.value


def _size(one: Tried) -> str:
    return f"{one.plan.network_bytes:,} bytes ({one.share:.3f})"
