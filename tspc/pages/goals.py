"""What a run was asked for, as it stands in the name of its directory: in words, and in order."""

from __future__ import annotations

from tspc.compression.goals import bytes_or_share

SIZE, ERROR, BITS = "size", "error", "bits"


def readable_goal(goal: str) -> str:
    """The goal in words: "0.2", "size 500kB", "error 0.3", "8 bits"."""
    for prefix in (SIZE, ERROR):
        if goal.startswith(prefix):
            return f"{prefix} {goal.removeprefix(prefix)}"
    return f"{goal.removesuffix(BITS)} {BITS}" if goal.endswith(BITS) else goal


def asked_of(method: str, goal: str, bits: str) -> str:
    """The method, the width and the goal in words: "cp at 0.2", "cp in 8 bits at 0.2", "dense in 8 bits"."""
    if goal.endswith(BITS):
        return f"{method} in {readable_goal(goal)}"
    width = f" in {bits} bits" if bits.isdigit() and bits != "32" else ""
    return f"{method}{width} at {readable_goal(goal)}"


def order_of_goal(goal: str) -> tuple[int, float]:
    """A sort key: rates in descending order, then sizes (bytes before shares), target errors, and widths."""
    if goal.startswith(SIZE):
        return 1, -(bytes_or_share(goal.removeprefix(SIZE)) or 0.0)
    if goal.startswith(ERROR):
        return 2, -float(goal.removeprefix(ERROR))
    if goal.endswith(BITS):
        width = goal.removesuffix(BITS)
        return 3, -float(width) if width.isdigit() else 0.0
    return 0, -float(goal)


def goal_in(overrides: dict[str, str]) -> str:
    """The goal that a command gives by its settings, or empty text."""
    named = {SIZE: overrides.get("size"), ERROR: overrides.get("target_error")}
    return next((f"{key}{value}" for key, value in named.items() if value), overrides.get("rate", ""))
