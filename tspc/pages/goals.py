"""What a run was asked for, as it stands in the name of its directory: in words, and in order."""

from __future__ import annotations

import re

from tspc.compression.goals import bytes_or_share, seconds_of

SIZE, ERROR, BITS, DROP, LATENCY, SPEEDUP = "size", "error", "bits", "drop", "latency", "speedup"
NAMED = (SIZE, ERROR, DROP, LATENCY, SPEEDUP)
"""Goals with a name in front of their value."""
_PARTS = re.compile(rf"(?:^|-)({'|'.join(NAMED)})(.+?)(?=-(?:{'|'.join(NAMED)})|$)")


def parts_of(goal: str) -> list[tuple[str, str]]:
    """The named goals in a goal and their values: [("drop", "1"), ("latency", "8ms")]."""
    return _PARTS.findall(goal)


def readable_goal(goal: str) -> str:
    """The goal in words: "0.2", "size 500kB", "error 0.3", "8 bits", "drop 1, latency 8ms"."""
    if parts := parts_of(goal):
        rest = goal[: goal.index(parts[0][0])].rstrip("-")
        return ", ".join([*([rest] if rest else []), *(f"{name} {value}" for name, value in parts)])
    return f"{goal.removesuffix(BITS)} {BITS}" if goal.endswith(BITS) else goal


def kind_of_goal(goal: str) -> str:
    """The name of the goal's first part; empty text for a rate."""
    parts = parts_of(goal)
    return parts[0][0] if parts and goal.startswith(parts[0][0]) else ""


def asked_of(method: str, goal: str, bits: str) -> str:
    """The method, the width and the goal in words: "cp at 0.2", "cp in 8 bits at 0.2", "dense in 8 bits"."""
    if goal.endswith(BITS):
        return f"{method} in {readable_goal(goal)}"
    width = f" in {bits} bits" if bits.isdigit() and bits != "32" else ""
    return f"{method}{width} at {readable_goal(goal)}"


def order_of_goal(goal: str) -> tuple[int, float]:
    """A sort key: rates in descending order, then sizes (bytes before shares), errors, widths, drops, and times."""
    kind = kind_of_goal(goal)
    if kind:
        value = parts_of(goal)[0][1]
        number = {SIZE: bytes_or_share, LATENCY: seconds_of}.get(kind, _number)(value) or 0.0
        return (1, 2, 4, 5, 6)[NAMED.index(kind)], number if kind == SPEEDUP else -number
    if goal.endswith(BITS):
        width = goal.removesuffix(BITS)
        return 3, -float(width) if width.isdigit() else 0.0
    return 0, -(_number(goal.partition("-")[0]) or 0.0)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def goal_in(overrides: dict[str, str]) -> str:
    """The goal that a command gives by its settings, or empty text."""
    keys = {"size": SIZE, "target_error": ERROR, "max_drop": DROP, "latency": LATENCY, "speedup": SPEEDUP}
    given = [f"{name}{overrides[key]}" for key, name in keys.items() if overrides.get(key)]
    return "-".join([*([overrides["rate"]] if overrides.get("rate") else []), *given])
