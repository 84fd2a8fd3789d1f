"""The measurements of `phase=benchmark`, in the form that the pages show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MACS, LATENCY = "MACs", "Latency"


@dataclass(frozen=True)
class Figure:
    """A quantity of the reference and of the compressed network; latency in milliseconds."""

    name: str
    before: float
    after: float
    format: Callable[[float], str]
    where: str


def figures_of(benchmark: dict[str, Any]) -> list[Figure]:
    """MACs of one input, and the median latency in the first runtime at the first batch size, if measured."""
    found = []
    cost = benchmark.get("cost") or {}
    if {"dense", "compressed"} <= set(cost):
        before, after = (cost[side]["macs"] for side in ("dense", "compressed"))
        found.append(Figure(MACS, before, after, readable_count, "one input"))
    timing = next((entry for entry in benchmark.get("timings") or [] if not entry.get("skipped")), None)
    if timing is not None:
        before, after = (1000 * timing[side]["median"] for side in ("dense", "compressed"))
        where = f"{timing['runtime']}, batch of {timing['batch_size']}, {benchmark.get('device', '')}"
        found.append(Figure(LATENCY, before, after, "{:.3g} ms".format, where))
    return found


def readable_bytes(count: float) -> str:
    """The count in the largest unit that is not above it, with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def readable_count(count: float) -> str:
    """The count as text, exact up to a million."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f}"
