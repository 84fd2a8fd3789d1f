"""What a plan is asked for: the goals, their units, which of them go together, and their names in a folder's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tspc.compression.form import DENSE
from tspc.compression.goal_names import DROP, GOALS, KINDS, TIMES
from tspc.compression.plan import PARAMETERS
from tspc.quantization.grids import FULL
from tspc.system.bounds import POSITIVE_SHARE, Bounds, out_of_range, shown

USUAL_RATE = 0.2
"""The rate if no goal is given."""
AUTO = "auto"
UNIT_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MANY_BYTES = 10**13
UNIT_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
LONGEST_SECONDS = 3600.0
DROPS = Bounds(0, 1e6, above=True)
SPEEDUPS = Bounds(1, 1e3)
DROP_TERMS, TIME_TERMS = ("confidence", "images"), ("batch", "threads")
"""The terms of a limit on the drop, and of one on the time, that are part of what is asked for."""
_NUMBER = r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)"


@dataclass(frozen=True)
class Terms:
    """How a limit on the drop or on the time is judged.

    - `confidence`: a limit on the drop holds with this probability, in [0.5, 1).
    - `images`: the number of held-out training images that judge the drop; None: as many as the limit needs.
    - `batch`: inputs in a batch whose time is limited.
    - `threads`: threads of the runtime; None: those of PyTorch.
    - `seconds`: how long the dense and the compressed network are timed in turns.
    """

    confidence: float = 0.95
    images: int | None = None
    batch: int = 1
    threads: int | None = None
    seconds: float = 5.0

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        allowed = {
            "confidence": Bounds(0.5, 1, below=True),
            "images": Bounds(100),
            "batch": Bounds(1, 1e5),
            "threads": Bounds(1, 1024),
            "seconds": Bounds(0, 1e5, above=True),
        }
        return out_of_range(self, where, allowed)

    @staticmethod
    def idle(goals: Mapping[str, Any], times_paths: bool) -> dict[str, str]:
        """The terms that have no effect with these goals, each with the reason; paths may be timed without a goal."""
        found: dict[str, str] = {} if _has(goals, (DROP,)) else dict.fromkeys(DROP_TERMS, f"{DROP}=null")
        if not times_paths and not _has(goals, TIMES):
            found |= dict.fromkeys((*TIME_TERMS, "seconds"), " and ".join(f"{key}=null" for key in TIMES))
        return found

    def of(self, goals: Mapping[str, Any]) -> dict[str, Any]:
        """The terms that have an effect on these goals, as plain data."""
        used = (DROP_TERMS if _has(goals, (DROP,)) else ()) + (TIME_TERMS if _has(goals, TIMES) else ())
        return {key: getattr(self, key) for key in used}


def _has(goals: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Whether one of these goals is given."""
    return any(goals.get(key) is not None for key in keys)


def bytes_or_share(size: str) -> float | None:
    """Bytes (above 1) or a share (at most 1) from text; None if it is neither."""
    found = re.fullmatch(rf"{_NUMBER} ?(|B|kB|KB|MB|GB|KiB|MiB|GiB)", size.strip())
    if found is None:
        return None
    number, unit = float(found.group(1)), found.group(2)
    if not unit:
        return number if 0 < number <= 1 else None
    count = number * UNIT_BYTES[unit]
    return count if 1 < count <= MANY_BYTES else None


def share_of(size: str, whole: int) -> float:
    """A size as a share of so many bytes, at most 1."""
    value = bytes_or_share(size)
    assert value is not None, "a size that was checked"
    return value if value <= 1 else min(value / whole, 1.0)


def seconds_of(latency: str) -> float | None:
    """Seconds from text such as "8ms", "500us" or "0.1s"; None if it is no time of up to an hour."""
    found = re.fullmatch(rf"{_NUMBER} ?(us|ms|s)", latency.strip())
    seconds = float(found.group(1)) * UNIT_SECONDS[found.group(2)] if found else 0.0
    return seconds if 0 < seconds <= LONGEST_SECONDS else None


def wrong_goals(settings: Any) -> list[str]:
    """One line for each goal with a wrong value; `settings` has a field for each goal."""
    limits = {"rate": POSITIVE_SHARE, "target_error": POSITIVE_SHARE, DROP: DROPS, "speedup": SPEEDUPS}
    found = out_of_range(settings, "", limits)
    if settings.size is not None and bytes_or_share(settings.size) is None:
        found.append(
            f"size={settings.size}: expected a number with a unit, as in 500kB, 2MB or 100000B, or a share of "
            "the network's bytes above 0 and at most 1"
        )
    if settings.latency is not None and seconds_of(settings.latency) is None:
        found.append(f"latency={settings.latency}: expected a time with a unit, as in 8ms, 500us or 0.1s")
    return found


def contradiction(given: Mapping[str, Any]) -> str | None:
    """What is wrong with goals that are given together, by name; None if nothing is."""
    for kind in KINDS:
        same = [key for key in kind if key in given]
        if len(same) > 1:
            return f"{_named(given, same)} are two goals; leave one of them out"
    if len(given) > 2:
        return f"{_named(given, list(given))} are {len(given)} goals; a network is planned for two at most"
    alone = [key for key in ("target_error", *(("rate",) if DROP in given else ())) if key in given]
    if len(given) == 2 and alone:
        return f"{_named(given, list(given))} cannot be combined; leave one of them out, or give size instead"
    return None


def _named(given: Mapping[str, Any], keys: list[str]) -> str:
    return " and ".join(f"{key}={shown(given[key])}" for key in keys)


def goals_in(settings: Any) -> dict[str, Any]:
    """The goals that are given, in the order of `GOALS`; `settings` has a field for each."""
    return {key: getattr(settings, key) for key in GOALS if getattr(settings, key) is not None}


def goal_of(settings: Mapping[str, Any]) -> str:
    """What a plan was asked for, as in a folder's name; `settings` are those of `PlanSettings.identity`.

    It is a rate, a size ("size0.1"), an error ("error0.3"), a drop ("drop1"), a time ("latency8ms", "speedup3"), two of
    these ("drop1-latency8ms"), or the width of a network that is not decomposed ("8bits").
    """
    given = {key: settings[key] for key in GOALS[1:] if settings.get(key) is not None}
    short = {"target_error": "error", DROP: "drop"}
    parts = [f"{short.get(k, k)}{v if isinstance(v, str) else f'{v:g}'}" for k, v in given.items()]
    has_rate = not given or (set(given) <= set(TIMES) and settings["rate"] < 1)
    if not has_rate:
        return "-".join(parts)
    is_rounded_only = settings["method"]["name"] == DENSE.name and settings.get("rate_unit", PARAMETERS) == PARAMETERS
    return f"{settings.get('bits')}bits" if is_rounded_only else "-".join([f"{settings['rate']:g}", *parts])


def bits_of(settings: Mapping[str, Any]) -> str:
    """The width that was asked for: "32", "8", …, or "auto"; `settings` are those of any version."""
    is_in_bytes = settings.get("size") is not None or settings.get(DROP) is not None
    return settings.get("bits") or (AUTO if is_in_bytes else str(FULL))
