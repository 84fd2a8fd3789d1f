"""Finds the smallest network whose drop on held-out inputs is within a limit, with a confidence.

A few networks are tried along the axis of sizes. They share the error curves and what the samples have shown. Some of
the held-out inputs, the *pilot*, show where the drop reaches the limit. This fixes a sequence of sizes, from larger to
smaller. The other inputs then test one size after the other: whether its drop is below the limit. The first size that
fails ends the sequence. The sequence does not depend on the inputs that test, so the chance that a network is let
through whose true drop is above the limit is at most the level: only the first such network of the sequence could begin
the mistake (fixed-sequence testing, as in Learn then Test, Angelopoulos et al., arXiv:2110.01052).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from scipy.special import ndtri
from torch import nn

from tspc.compression.limits import LEAST, Limit, changed
from tspc.compression.plan import Plan
from tspc.errors import ConfigError, InfeasibleDropError, InfeasibleRateError
from tspc.training.confidence import Drop

STEP, AHEAD = 0.88, 1.5
"""The ratio of sizes that follow each other, and how many steps before the size sought the sequence begins."""
MAIN = 0.8
"""The share of the level for the sequence; the rest is for others of larger networks, in case its first one fails."""
LARGER = (1.8, 1.25), (8.0, 4.0, 2.5)
"""How much larger they are. The second of these sequences is for the case that the first network of the first fails."""
FIRST_LOOK = 0.25, 0.2
"""A test looks first at this share of the inputs, and spends this share of its level on it."""
HOPELESS = 1.5
"""A test ends early if the drop lies so many standard errors above the limit."""
TYPICAL, POWER = 150.0, 2.2
"""The drop of a typical network in points of top-1: a constant, times this power of the expected error."""
DOUBT, MORE_DOUBT = 1.0, 3.0
"""The standard deviation of the logarithm of that constant among networks; the second is for other metrics."""
PILOTS, NEAR = 3, 0.25
"""The pilot judges at most so many networks, until the size sought is near that of the last one, in logarithms."""


class Made(Protocol):
    """Makes the network of a plan, in phase 0."""

    def __call__(self, plan: Plan) -> tuple[nn.Module, Plan]: ...


class Judge(Protocol):
    """Compares networks with the reference on held-out inputs, of which there are `count`."""

    count: int

    @property
    def has_counts(self) -> bool:
        """Whether each input is right or wrong, so that a loss is −1, 0 or 1."""
        ...

    def drop(self, network: nn.Module, start: int, stop: int) -> Drop:
        """The drop on the inputs from `start` to `stop`."""
        ...


@dataclass
class Tried:
    """A network that was made, at a size as a share of the bytes before, and what it loses.

    `expected` is the root mean square of the layers' expected errors. `passed` is None if nothing was tested.
    """

    share: float
    network: nn.Module
    plan: Plan
    expected: float = 0.0
    drop: Drop | None = None
    passed: bool | None = None
    level: float = 0.0
    """The level of its last test."""

    def to_dict(self) -> dict[str, Any]:
        drop = None if self.drop is None else {"points": self.drop.value, "inputs": self.drop.inputs}
        return {"share": self.share, "bytes": self.plan.network_bytes, "passed": self.passed, "drop": drop}

    def __str__(self) -> str:
        return f"{self.plan.network_bytes:,} bytes ({self.share:.3f})"


@dataclass
class Search:
    """The search for one network. `plan_at` gives the plan for a share of the bytes, `make` its network.

    `expected_at` tells the error that is to be expected at a share; by default that of the plan.
    """

    plan_at: Callable[[float], Plan]
    make: Made
    judge: Judge
    limit: Limit
    smallest_share: float
    say: Callable[[str], None] = lambda line: None
    expected_at: Callable[[float], float | None] | None = None
    tried: dict[float, Tried] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.limit.check(self.judge.count, self.judge.has_counts)
        self.pilot, self.inputs = self.limit.parts(self.judge.count)

    def _least_p(self, inputs: int) -> float:
        """The p-value if nothing at all is lost on so many inputs."""
        return self.limit.least_p(inputs) if self.judge.has_counts else 0.0

    def run(self) -> Tried:
        """The smallest network that keeps the limit. Raises InfeasibleDropError, with the nearest limit."""
        share = self._by_pilot()
        if self.limit.is_trained:  # the test at the end tells whether so small a network keeps the limit
            return self._estimated(max(min(share, self.limit.share), self.smallest_share))
        found = self._by_tests(share)
        if found.share > self.limit.share:
            both = f"max_drop={self.limit.drop:g} and a size of {self.limit.share:.4g} of the bytes cannot both be met"
            raise ConfigError([f"{both}: the smallest network within the drop has {found}"])
        return found

    def judged(self, one: Tried) -> dict[str, Any]:
        """What the held-out inputs said of the networks that were tried, and of the chosen one; plain data."""
        bound = None if one.drop is None or one.passed is None else one.drop.bound(one.level)
        found = {"max_drop": self.limit.drop, "confidence": 1 - self.limit.level, "bound": bound}
        tried = [each.to_dict() for each in sorted(self.tried.values(), key=lambda each: -each.share)]
        return found | one.to_dict() | {"is_exact": one.drop is not None and one.drop.is_exact, "tried": tried}

    # The pilot.

    def _by_pilot(self) -> float:
        """The smallest size at which the limit is expected to be kept, as a share."""
        share = self._wanted()
        for _ in range(PILOTS):
            self._estimated(share)
            before, share = share, self._wanted()
            if abs(math.log(share / before)) < NEAR:
                break
        return share

    def _estimated(self, share: float) -> Tried:
        """A network with its drop on the pilot."""
        one = self._made(share)
        if one.drop is None:
            one.drop = self.judge.drop(one.network, 0, self.pilot)
            when = " before training" if self.limit.is_trained else ""
            self.say(f"{one} loses {one.drop.value:.2f} points on {one.drop.inputs:,} inputs of the pilot{when}")
        return one

    def _wanted(self) -> float:
        """The share at which the expected drop, and what its bound adds, come to the limit."""
        constant, points = self._constant(), self.limit.drop
        low, high = 1e-4, 2.0
        for _ in range(40):
            error = math.sqrt(low * high)
            drop = constant * error**POWER
            if self.limit.is_trained:
                drop = self.limit.given_back(drop)
            deviation = 100 * math.sqrt(changed(drop / 100)) if self.judge.has_counts else 0.0
            room = -float(ndtri(self.limit.level)) * deviation / math.sqrt(self.inputs)
            low, high = (error, high) if drop + room < max(points, 1.2 * room) else (low, error)
        return self._share_for(low)

    def _constant(self) -> float:
        """Drop ÷ error^POWER: what is typical, and what the pilot has shown of this network (a posterior mean)."""
        doubt = DOUBT if self.judge.has_counts else MORE_DOUBT
        logs = np.linspace(math.log(TYPICAL) - 4 * doubt, math.log(TYPICAL) + 4 * doubt, 401)
        likely = -0.5 * ((logs - math.log(TYPICAL)) / doubt) ** 2
        for one in self.tried.values():
            if one.drop is None:
                continue
            drops = np.exp(logs) * max(one.expected, 1e-9) ** POWER
            errors = one.drop.points * one.drop.error
            if self.judge.has_counts:
                errors = 100 * np.sqrt(changed(drops / 100) / one.drop.count)
            likely += -0.5 * ((one.drop.value - drops) / np.maximum(errors, 1e-12)) ** 2
        weights = np.exp(likely - likely.max())
        return math.exp(float((weights * logs).sum() / weights.sum()))

    # The sequence.

    def _by_tests(self, share: float) -> Tried:
        """The last network that passes."""
        self.tried = {known: replace(one, drop=None) for known, one in self.tried.items()}
        start, main = self._through_a_known_size(share / STEP**AHEAD), MAIN
        larger = LARGER if LARGER[0][0] * start < 1 else LARGER[:1]  # no second sequence from the whole network on
        rest = (1 - MAIN) / len(larger)
        if self._least_p(self.inputs) > rest / 2 * self.limit.level:
            start, main = 2 * start, 1.0  # there is nothing to divide
        best = self._last_of(self._sequence(start), main)
        for sequence in larger if main < 1.0 else ():
            best = best or self._last_of((min(times * start, 1.0) for times in sequence), rest)
        if best is None:
            tested = [one for one in self.tried.values() if one.passed is not None]
            raise InfeasibleDropError([self._refusal(max(tested, key=lambda one: one.share))])
        return best

    def _through_a_known_size(self, start: float) -> float:
        """A start near this one, from which the sequence comes to the last network of the pilot, which is made already.

        The pilot chooses the sequence anyway, so it still does not depend on the inputs that test.
        """
        if not self.tried:
            return start
        last = [*self.tried][-1]
        return last / STEP ** round(math.log(last / start) / math.log(STEP))

    def _last_of(self, sequence: Iterator[float], part: float) -> Tried | None:
        """The last network before the first one that fails; None if that is the first of all."""
        best: Tried | None = None
        for share in sequence:
            one = self._made(share)
            if not self._passes(one, part):
                break
            best = one
        return best

    def _sequence(self, share: float) -> Iterator[float]:
        """Falling sizes, the smallest one at the end."""
        while share > self.smallest_share:
            yield min(share, 1.0)
            share *= STEP
        yield self.smallest_share

    def _passes(self, one: Tried, part: float) -> bool:
        """Whether the drop is below the limit at this part of the level. There are two looks, or one if it is clear."""
        level, (first, spent) = part * self.limit.level, FIRST_LOOK
        looks = [(int(self.inputs * first), spent * level), (self.inputs, (1 - spent) * level)]
        is_useful = looks[0][0] >= LEAST and self._least_p(looks[0][0]) <= looks[0][1]
        for inputs, at in looks if is_useful else [(self.inputs, level)]:
            one.drop = self.judge.drop(one.network, self.pilot, self.pilot + inputs)
            one.passed, one.level = one.drop.p_value(self.limit.drop) <= at, at
            if one.passed or one.drop.value - HOPELESS * one.drop.points * one.drop.error > self.limit.drop:
                break
        assert one.drop is not None
        verdict = "passes" if one.passed else "does not pass"
        self.say(f"{one} loses {one.drop.value:.2f} points on {one.drop.inputs:,} held-out inputs: {verdict}")
        return bool(one.passed)

    def _refusal(self, one: Tried) -> str:
        drop = self.judge.drop(one.network, self.pilot, self.pilot + self.inputs)
        # With the limit that it names, a part of the level may go to a first look.
        bound = math.ceil(100 * drop.bound((1 - FIRST_LOOK[1]) * one.level)) / 100
        return (
            f"max_drop={self.limit.drop:g} cannot be shown with confidence {1 - self.limit.level:g} on "
            f"{drop.inputs:,} held-out inputs: the network at {one.share:.3g} of the bytes loses "
            f"{drop.value:.2f} points, at most {bound:g}; give max_drop={bound:g}, or more inputs"
        )

    # Networks by size.

    def _made(self, share: float) -> Tried:
        """The network of this size; one that was made already and is as large, up to a hundredth, serves as well."""
        near = [known for known in self.tried if abs(math.log(known / share)) < 0.01]
        if not near:
            plan = self.plan_at(share)
            network, done = self.make(plan)
            self.tried[share] = Tried(share, network, done, plan.output_error or 0.0)
        return self.tried[near[0] if near else share]

    def _expected(self, share: float) -> float | None:
        return self.plan_at(share).output_error if self.expected_at is None else self.expected_at(share)

    def _share_for(self, error: float) -> float:
        """The share at which the layers' errors are expected to have this root mean square."""
        low, high = self.smallest_share, 1.0
        for _ in range(12):
            middle = math.sqrt(low * high)
            try:
                is_worse = (self._expected(middle) or 0.0) > error
            except InfeasibleRateError:
                is_worse = True
            low, high = (middle, high) if is_worse else (low, middle)
        return high
