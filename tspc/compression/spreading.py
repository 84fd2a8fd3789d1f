"""Divides layers among several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from tspc.calibration.samples import Survey
from tspc.compression.plan import LayerPlan
from tspc.system import processes

Result = TypeVar("Result")


def over_processes(
    layers: Iterable[LayerPlan], survey: Survey | None, work: Callable[[list[str]], dict[str, Result]]
) -> dict[str, Result]:
    """What `work` returns for the names of all layers; see `processes.spread`. Each layer is independent of the others.

    Layers with the same input go to the same process, because their second moments are the same.
    """
    rows = {layer.name: layer for layer in layers}
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(name if survey is None else survey.trace.same_input.get(name, name), []).append(name)

    def cost(group: list[str]) -> float:
        return sum(math.prod(rows[name].shape) * math.prod(rows[name].shape[1:]) for name in group)

    return processes.spread(list(groups.values()), cost, lambda some: work([name for group in some for name in group]))
