"""The frontier of a network: sizes and, in a named runtime, times against the error that is to be expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tspc.compression.error_curve import Curves
from tspc.compression.plan import Plan, error_of
from tspc.compression.settings import PlanSettings
from tspc.compression.time_plans import Timekeeper, timekeeper
from tspc.errors import ConfigError, InfeasibleRateError
from tspc.phases.planning import Planning

FILE = "frontier.json"
"""Where the points lie, beside what is known of the reference."""


@dataclass(frozen=True)
class Point:
    """A network that can be had: what it is asked for with, its bytes, the expected error of the layers' outputs.

    `seconds` are those of a batch in the named runtime, as the times of the single layers let expect; else None.
    """

    goal: str
    rate: float
    bytes: int
    error: float | None
    seconds: float | None = None


def by_size(
    planning: Planning, plans: Mapping[float, Plan | InfeasibleRateError], keeper: Timekeeper | None
) -> list[Point]:
    """A point for each plan, the largest first."""
    key, found = "size" if planning.counts_network else "rate", []
    for rate, plan in plans.items():
        if isinstance(plan, Plan):
            seconds = None if keeper is None else keeper.expected(plan.budgeted)
            found.append(Point(f"{key}={rate:.4g}", rate, plan.network_bytes, plan.output_error, seconds))
    return found


def by_time(planning: Planning, speedups: Iterable[float], curves: Curves, keeper: Timekeeper) -> list[Point]:
    """A point for each speedup that the times of the single layers let expect, of any size; the slowest first."""
    sketch = replace(planning.sketch, settings=_timed(planning.settings))
    ordered, found = sorted(speedups), []
    for speedup, rows in zip(
        ordered, keeper.expecting(sketch.candidates(curves), [1 / x for x in ordered]), strict=True
    ):
        if rows is not None:
            size = sketch.network_bytes - sum(row.dense_bytes - row.bytes for row in rows)
            found.append(Point(f"speedup={speedup:g}", 1.0, size, error_of(rows), keeper.expected(rows)))
    return found


def keeper_of(planning: Planning) -> Timekeeper | None:
    """What times layers in the runtime; None if none is named, or the network cannot be timed in it."""
    settings = planning.settings
    if settings.runtime == PlanSettings.runtime and not settings.is_timed:
        return None
    names = [layer.name for layer in planning.sketch.chosen]
    try:
        return timekeeper(planning.reference, _timed(settings), names, planning.example)
    except ConfigError:
        return None


def frontier_of(
    planning: Planning, sized: Iterable[Point], timed: Iterable[Point], keeper: Timekeeper | None
) -> dict[str, Any]:
    """The points of the frontier with the dense network, as plain data."""
    dense = None if keeper is None else keeper.watch.dense_seconds
    return {
        "method": planning.settings.method.name,
        "runtime": None if keeper is None else planning.settings.runtime,
        "dense": {"bytes": planning.sketch.network_bytes, "seconds": dense},
        "by_size": [dict(vars(point)) for point in sized],
        "by_time": [dict(vars(point)) for point in timed],
    }


def _timed(settings: PlanSettings) -> PlanSettings:
    return replace(settings, latency=None, speedup=None, objective="latency")
