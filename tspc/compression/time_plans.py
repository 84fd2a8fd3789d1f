"""Plans under a limit on the time, and plans that are never slower than the dense network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from tspc.compression.allocation import Candidate
from tspc.compression.form import DENSE
from tspc.compression.layer_times import LayerTimes
from tspc.compression.network_times import SECONDS, Stopwatch, Try, chosen, guessed, limit_seconds, place_of, search
from tspc.compression.path_costs import Costs, Size, calls
from tspc.compression.plan import LayerPlan
from tspc.compression.settings import PlanSettings
from tspc.compression.timed import Allocation, Option, options_of
from tspc.data.arranging import as_positional
from tspc.data.model_inputs import Given
from tspc.deploy.calls import EXTRAS, family
from tspc.errors import ConfigError, DataError, InfeasibleTimeError
from tspc.layers.chains import REBUILT
from tspc.layers.convolutions import Form
from tspc.system import extras

NOISE = 0.01
"""A network whose median time is so little above the dense one's is not slower: the clock is no more certain."""

ROOM = 1.07
"""A refusal advises so much more than the fastest time that was measured: the clock may differ at the next time."""

Rows = list[LayerPlan]


@dataclass
class Timekeeper:
    """What a plan knows of times: those of single layers in a table, and those of whole networks from a stopwatch.

    `called` has the sizes of the inputs of every call of a layer.
    """

    model: nn.Module
    settings: PlanSettings
    called: Mapping[str, Sequence[Size]]
    times: LayerTimes
    watch: Stopwatch
    promise: dict[str, Any] | None = None

    def for_settings(self, settings: PlanSettings) -> Timekeeper:
        """The same for another limit in the same place, or without one."""
        return replace(self, settings=settings, promise=None)

    @cached_property
    def costs(self) -> Costs:
        """The costs of paths, from the table."""
        sizes = {name: max(found, key=math.prod) for name, found in self.called.items()}
        return Costs(objective="latency", sizes=sizes, runtime=self.settings.runtime, times=self.times)

    def seconds(self, row: LayerPlan) -> float:
        """The time of a layer on its path, for a batch, over all its calls; a table of embeddings takes none."""
        if row.is_table:
            return 0.0
        form, path = Form.of(self.model.get_submodule(row.name)), row.path if row.rank else None
        method = (row.method or DENSE).for_shape(row.shape)
        sizes = self.called.get(row.name, ())
        return sum(self.times.seconds(form, row.shape, x, method, row.rank or (), path or REBUILT) for x in sizes)

    def share(self, rows: Iterable[LayerPlan]) -> float:
        """The time of the network of a plan, as a share of the dense one's.

        A layer that is never called stays dense there: the network uses its weight, which is the rebuilt kernel.
        """
        return self.watch.rows([row for row in rows if self.called.get(row.name)])

    def expected(self, rows: Iterable[LayerPlan]) -> float:
        """Seconds of the network of a plan for a batch, as the times of the single layers let expect."""
        pairs = [(self.seconds(replace(row, method=None, rank=None)), self.seconds(row)) for row in rows]
        before, after = (sum(times) for times in zip(*pairs, strict=True))
        return self.watch.dense_seconds * (1 - self._worth(before) * (before - after))

    def expecting(self, candidates: Sequence[Candidate], shares: Iterable[float]) -> list[Rows | None]:
        """For each share of the dense network's time the rows with the least error that are expected to take it."""
        choices = Allocation([options_of(candidate, self.seconds, self._on_path) for candidate in candidates])
        self.times.keep()
        dense = choices.dense_seconds
        found = [choices.at(dense - (1 - share) / self._worth(dense)) for share in shares]
        return [None if options is None else [option.row for option in options] for options in found]

    def _worth(self, layers: float) -> float:
        """By which share the network is expected to become faster for a second less in its layers, of so many."""
        return guessed(layers, self.watch.dense_seconds)

    def _on_path(self, row: LayerPlan) -> LayerPlan:
        return self.costs.best(self.model.get_submodule(row.name), row)

    def under_limit(self, candidates: Sequence[Candidate], size: float) -> Rows:
        """The rows with the least error whose network keeps the limit on the time, and the limit on the size.

        Raises InfeasibleTimeError if no network is so fast, ConfigError if the dense one is already.
        """
        dense = self.watch.dense_seconds
        limit = limit_seconds(self.settings, dense) / dense
        where = f"in {self.settings.runtime}"
        if limit >= 1 and math.isinf(size):
            raise ConfigError(
                [
                    f"{self.settings.time_limit} is kept already: the dense network takes {shown(dense)} {where}, so "
                    "nothing needs to change; ask for less time, or for a rate or a size"
                ]
            )
        tried = self._search(candidates, size, limit)
        found = chosen(tried, limit)
        if found is None:
            fastest = min(each.share for each in tried) * dense
            within = " and this size" if self.settings.size or self.settings.rate else ""
            told = (
                f"the fastest network of these methods{within} takes {shown(fastest)} {where} (dense: {shown(dense)}, "
                f"{dense / fastest:.2f} times as long); ask for {shown(ROOM * fastest)} at least, or let keep_first, "
                "keep_last and exclude keep fewer layers dense"
            )
            if fastest > (1 - NOISE) * dense:
                told = f"no network of these methods{within} is faster than the dense one {where} ({shown(dense)})"
            raise InfeasibleTimeError(f"{self.settings.time_limit} cannot be met: {told}", fastest)
        self._promise(self.settings.time_limit, found.share)
        return _rows(found)

    def never_slower(self, candidates: Sequence[Candidate], rows: Iterable[LayerPlan], size: float) -> Rows | None:
        """Other rows for a plan whose network is slower than the dense one; None if it is not."""
        self.times.keep()
        rows, share = list(rows), 1.0
        if any(row.rank and row.path != REBUILT for row in rows):
            share = self.share(rows)
        if share <= 1 + NOISE:
            self._promise("objective=latency", share)
            return None
        if self.settings.allocation == "global":
            found = chosen(self._search(candidates, size, 1.0), 1.0)
            if found is not None:
                self._promise("objective=latency", found.share)
                return _rows(found)
        self._promise("objective=latency", 1.0)  # the graph of the dense network
        return [replace(row, path=REBUILT) if row.rank else row for row in rows]

    def _search(self, candidates: Sequence[Candidate], size: float, limit: float) -> list[Try]:
        choices = Allocation([options_of(candidate, self.seconds, self._on_path) for candidate in candidates])
        self.times.keep()
        fastest = choices.fastest(size)

        def allocate(seconds: float) -> list[Option]:
            found = choices.at(max(seconds, fastest), size)
            assert found is not None, "the fastest options are within their own time"
            return found

        def total(found: list[Option]) -> float:
            return sum(option.seconds for option in found)

        def measure(found: list[Option]) -> float:
            return self.share([option.row for option in found])

        bounds = fastest, choices.dense_seconds
        return search(allocate, total, measure, limit, bounds, self.watch.dense_seconds)

    def _promise(self, limit: str, share: float) -> None:
        place, dense = self.times.place, self.watch.dense_seconds
        self.promise = {"limit": limit, "runtime": place.runtime, "batch": place.batch, "threads": place.threads}
        self.promise |= {"dense_seconds": dense, "seconds": share * dense}


def _rows(found: Try) -> Rows:
    return [option.row for option in found.rows]


def timekeeper(
    model: nn.Module, settings: PlanSettings, names: Sequence[str], example: Given | None
) -> Timekeeper | None:
    """A timekeeper for layers of these names; None if the settings need no times.

    Without a limit, for `objective=latency`, it is None too if there is no example that the network takes, or the
    runtime is not installed. With a limit this raises ConfigError.
    """
    if not settings.is_timed and settings.objective != "latency":
        return None
    called = {} if example is None else calls(model, names, example)
    if example is None or not called:
        if settings.is_timed:
            why = "there is none" if example is None else "the network fails on the one given"
            raise ConfigError([needs_example(settings, why)])
        return None
    try:
        tensors = example if isinstance(example, Tensor) else as_positional(model, example)
    except DataError as error:
        if settings.is_timed:
            raise ConfigError([needs_example(settings, str(error))]) from error
        return None
    if family(settings.runtime) in EXTRAS and extras.missing(EXTRAS[family(settings.runtime)]) is not None:
        return None  # with a limit the settings are refused before
    place = place_of(settings, model)
    watch = Stopwatch(model, tensors, place, min(settings.terms.seconds, SECONDS))
    return Timekeeper(model, settings, called, LayerTimes(place), watch)


def needs_example(settings: PlanSettings, why: str = "there is none") -> str:
    """What is wrong if a network is to be timed without an input that it takes."""
    return f"{settings.time_limit} needs an example input, and {why}: give example=… or calibration data"


def shown(seconds: float) -> str:
    """A time with its unit: "8.25ms", "510us"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g}{unit}"
    return f"{seconds * 1e6:.3g}us"
