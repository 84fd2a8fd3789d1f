"""What `phase=benchmark` measured, as the pages show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A quantity of the reference and of the compressed network."""

    name: str
    before: float
    after: float
    format: Callable[[float], str]
    more_is_better: bool = False


def figures_of(benchmark: dict[str, Any]) -> list[Figure]:
    """MACs and latency, where they were measured."""
    return []
