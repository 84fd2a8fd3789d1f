"""The fastest network within a drop, where no network keeps both limits: on the drop and on the time."""

from __future__ import annotations

import math
from collections.abc import Callable

from tspc.compression.plan import Plan
from tspc.compression.smallest import Search, Tried
from tspc.compression.time_plans import shown
from tspc.errors import ConfigError, InfeasibleDropError, InfeasibleTimeError

TRIES = 3
"""Networks that are made on the way."""


def run(search: Search, plan_in: Callable[[float], Plan]) -> Tried:
    """The network that a search finds; `plan_in` gives the plan of any size that takes a share of the dense time.

    Raises InfeasibleDropError if there is none. If the search has a limit on the time, the error also names about the
    fastest network that loses no more.
    """
    try:
        return search.run()
    except InfeasibleDropError as error:
        promise = next(iter(search.tried.values())).plan.promise
        if promise is None or not promise["limit"].startswith(("latency", "speedup")):
            raise
        seconds = _fastest(search, plan_in, promise["seconds"] / promise["dense_seconds"])
        told = "nearly as long as the dense one" if seconds is None else f"about {shown(seconds)}"
        about = f"the fastest network that was found within {search.limit.drop:g} points takes {told}"
        raise InfeasibleDropError([*error.problems, f"{about} (asked: {promise['limit']})"]) from error


def _fastest(search: Search, plan_in: Callable[[float], Plan], share: float) -> float | None:
    """Seconds of the fastest network of a bisection between this share of the dense time and all of it."""
    low, high, best = share, 1.0, None
    for _ in range(TRIES):
        middle = math.sqrt(low * high)
        try:
            network, plan = search.make(plan_in(middle))
        except (ConfigError, InfeasibleTimeError):  # no network takes just so long
            low = middle
            continue
        drop = search.judge.drop(network, search.pilot, search.pilot + search.inputs)
        if drop.value <= search.limit.drop and plan.promise is not None:
            high, best = middle, plan.promise["seconds"]
        else:
            low = middle
    return best
