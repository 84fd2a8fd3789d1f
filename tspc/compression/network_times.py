"""Times whole networks of a plan before any factor is fitted, for a time does not depend on the values of the factors.

The sum of the layers' times is not the time of the network: other operations take time, too, and layers in a network
find other caches. So a plan under a limit is found in a closed loop. The network of a plan is made with random factors,
exported, and timed in turns with the dense one; then the limit on the sum of the layers is moved.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tspc.compression.goals import seconds_of
from tspc.compression.layer_times import Place, threads
from tspc.compression.plan import LayerPlan
from tspc.compression.settings import PlanSettings
from tspc.decompositions import Decomposition, Rank
from tspc.deploy.calls import FLOAT32, Run, Unusable, call, family, precision
from tspc.deploy.exporting import INT8
from tspc.deploy.grafting import grafted
from tspc.deploy.graphs import Graphs
from tspc.deploy.layer_graphs import Operation, operations
from tspc.deploy.programs import Inputs, as_inputs, take
from tspc.deploy.timing import summary, turns
from tspc.errors import ExportError, UntimedError
from tspc.layers.chains import REBUILT, stages_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import kernel_of
from tspc.layers.forms import untrained
from tspc.layers.replacing import set_module
from tspc.system.modes import own_modes
from tspc.traversal.copying import copied
from tspc.traversal.hooks import evaluating

AIM = 0.97
"""A plan aims at this share of its limit, for the file is timed again at the end."""
ENOUGH = 0.94, 0.985
"""A plan is good if its network takes between these shares of the limit."""
TRIES = 6
"""The most networks that are timed for one plan."""
MARGIN = 0.05
"""Between two tries the next one keeps this share of their distance from both."""
SECONDS = 2.0
"""How long a network of a plan is timed, at most."""
DENSE, TRIED = "dense", "tried"
TOLERANCE = 0.05
"""A limit is kept if the exported file takes at most so much more: the clock itself is no more certain."""
USUAL = 0.7
"""The least share of the dense network's time that its layers are first taken for."""
SLOPES = 0.25, 4.0
"""How much the network's time may change for one second of the layers' sum, against the first guess."""

Rows = TypeVar("Rows")


def place_of(settings: PlanSettings, model: nn.Module) -> Place:
    """Where the network of a plan will run."""
    terms, parameter = settings.terms, next(model.parameters(), torch.zeros(()))
    return Place(settings.runtime, terms.batch, terms.threads or torch.get_num_threads(), parameter.device)


def filled(inputs: Tensor | Inputs, place: Place) -> Inputs:
    """A batch like these inputs; floating-point numbers are random, for zeros may take another time."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for x in take(as_inputs(inputs), place.batch):
        if x.is_floating_point():
            x = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
        found.append(x.cpu() if place.is_elsewhere else x)
    return tuple(found)


@torch.no_grad()
def with_random_factors(model: nn.Module, rows: Iterable[LayerPlan]) -> nn.Module:
    """A copy of a network with the layers of a plan, whose kernels have about the size of the dense ones.

    Layers that rebuild their kernel stay dense: a runtime rebuilds it once, when it loads the file. Numbers that are
    too small would slow the processor.
    """
    small = copied(model)
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        if not _is_chain(row):
            continue
        dense: Any = small.get_submodule(row.name)
        layer: Any = untrained(dense, cast(Decomposition, row.method), cast(Rank, row.rank), row.path)
        for factor in layer.factor_tensors():
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float32, device="cpu"))
        kernel, own = kernel_of(layer).float(), kernel_of(dense).float()
        layer.factor_tensors()[-1].mul_(own.square().mean().sqrt().clamp_min(1e-6) / kernel.square().mean().sqrt())
        if layer.bias is not None:
            layer.bias.copy_(dense.bias)
        set_module(small, row.name, layer)
    return small.eval()


@dataclass(frozen=True)
class Measured:
    """Seconds of the dense and the compressed network for a batch, of every turn."""

    dense: list[float]
    compressed: list[float]

    @property
    def share(self) -> float:
        """The median of compressed ÷ dense over the turns."""
        return statistics.median(b / a for a, b in zip(self.dense, self.compressed, strict=True))


class Stopwatch:
    """Times networks in turns with the dense one, exported to the runtime of a place.

    Raises UntimedError if the runtime cannot be used, or does not take the network.
    """

    def __init__(self, model: nn.Module, inputs: Tensor | Inputs, place: Place, seconds: float) -> None:
        self.model, self.place, self.seconds = model, place, seconds
        self.inputs = filled(inputs, place)
        self._graphs = Graphs({DENSE: model}, self.inputs)
        self._dense: Run | None = None
        self._all: list[float] = []

    @property
    def dense_seconds(self) -> float:
        """The median time of the dense network over all turns so far, or in a few runs of its own."""
        if not self._all:
            self.of(None)
        return statistics.median(self._all)

    def rows(self, rows: Sequence[LayerPlan]) -> float:
        """The time of the network of a plan, as a share of the dense one's."""
        grafted = self._grafted(rows)
        if grafted is None:
            return self.of(with_random_factors(self.model, rows)).share
        graphs = Graphs({TRIED: self.model}, self.inputs)
        graphs.put(TRIED, grafted)
        return self._timed(lambda: self._call(graphs, TRIED)).share

    def of(self, small: nn.Module | None) -> Measured:
        """The dense network and another one, which is exported; with None the dense one against itself."""
        if small is None:
            return self._timed(None)
        return self._timed(lambda: self._call(Graphs({TRIED: small}, self.inputs), TRIED))

    @own_modes()
    def _timed(self, other: Callable[[], Run] | None) -> Measured:
        with threads(self.place.threads), evaluating(self.model), torch.no_grad():
            dense = self._dense = self._dense or self._call(self._graphs, DENSE)
            runs = [dense, dense if other is None else other()]
            for run in (*runs, *runs):
                run()
            found = list(turns(runs, self.inputs[0].device, self.seconds))
        if family(self.place.runtime) == "compile":
            torch.compiler.reset()
            self._dense = None
        self._all += [turn[0] for turn in found]
        return Measured([turn[0] for turn in found], [turn[1] for turn in found])

    def _call(self, graphs: Graphs, side: str) -> Run:
        try:
            return call(graphs, side, self.place.runtime, self.inputs)
        except Unusable as error:
            raise UntimedError([f"runtime={self.place.runtime}: {error}"]) from error

    def _grafted(self, rows: Sequence[LayerPlan]) -> bytes | None:
        """The dense network's graph with the layers of a plan; None if it cannot be had so."""
        if not self.place.is_elsewhere or precision(self.place.runtime) == INT8:
            return None  # the graph in 8 bits is made with the network itself
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in self.model.parameters()):
            return None  # a grafted chain has float32 numbers
        try:
            with evaluating(self.model):
                graph = self._graphs.graph(DENSE, FLOAT32)
        except ExportError as error:
            raise UntimedError([f"runtime={self.place.runtime}: {error}"]) from error
        return grafted(graph, self.model, {row.name: _parts(self.model, row) for row in rows if _is_chain(row)})


def _is_chain(row: LayerPlan) -> bool:
    return row.method is not None and bool(row.rank) and row.path not in (None, REBUILT)


def _parts(model: nn.Module, row: LayerPlan) -> tuple[Operation, ...]:
    form = Form.of(model.get_submodule(row.name))
    assert row.method is not None
    assert row.rank is not None
    assert row.path is not None
    return operations(form, stages_of(row.method.for_shape(row.shape), row.shape, row.rank, row.path, form.groups))


@dataclass(frozen=True)
class Try:
    """What was found for one limit on the sum of the layers: the rows, their sum, the share of the dense time."""

    rows: Any
    total: float
    share: float


def search(
    allocate: Callable[[float], Rows],
    total: Callable[[Rows], float],
    measure: Callable[[Rows], float],
    limit: float,
    bounds: tuple[float, float],
    dense_seconds: float,
) -> list[Try]:
    """Networks that were timed on the way to one that takes just below `limit`, a share of the dense network's time.

    `allocate` gives the best rows whose layers take so many seconds together, between the `bounds`: those of the
    fastest rows and of the dense layers. `total` is their sum, `measure` the whole network's share of the dense time.
    """
    fastest, slowest = bounds
    guess = guessed(slowest, dense_seconds)
    aim, tried = AIM * limit, [Try(None, slowest, 1.0)]
    for _ in range(TRIES):
        rows = allocate(min(max(_proposed(tried, aim, guess), fastest), slowest))
        if any(each.rows == rows for each in tried):
            break
        tried.append(Try(rows, total(rows), measure(rows)))
        if ENOUGH[0] * limit <= tried[-1].share <= ENOUGH[1] * limit:
            break
    if all(each.share > limit for each in tried[1:]):
        rows = allocate(fastest)
        if all(each.rows != rows for each in tried):
            tried.append(Try(rows, total(rows), measure(rows)))
    return tried[1:]


def guessed(layers: float, dense: float) -> float:
    """By which share of its time a dense network becomes faster for a second less in its layers: a first guess.

    The layers take so many seconds together in the table.
    """
    most = dense / layers  # the rest of the network takes no time at all
    return min(most, max(1.0, USUAL * most)) / dense


def _proposed(tried: Sequence[Try], aim: float, guess: float) -> float:
    """The sum of layers' times at which the network is expected to take the share `aim`.

    It lies on the line through the nearest tries on both sides, or else through the dense network and the lowest try.
    """
    above = min((x for x in tried if x.share > aim), key=lambda x: x.total, default=tried[0])
    lower = [x for x in tried if x.share <= aim and x.total < above.total]
    if lower:
        below = max(lower, key=lambda x: x.total)
        place = (aim - below.share) / (above.share - below.share)
        return below.total + min(max(place, MARGIN), 1 - MARGIN) * (above.total - below.total)
    slope = guess
    if above.total < tried[0].total:
        slope = (tried[0].share - above.share) / (tried[0].total - above.total)
        slope = min(max(slope, SLOPES[0] * guess), SLOPES[1] * guess)
    return above.total - (above.share - aim) / slope


def chosen(tried: Sequence[Try], limit: float) -> Try | None:
    """The try that keeps the limit with some room, and of several the slowest one; else one that just keeps it."""
    for most in (ENOUGH[1] * limit, limit):
        keeping = [each for each in tried if each.share <= most]
        if keeping:
            return max(keeping, key=lambda each: each.total)
    return None


def limit_seconds(settings: PlanSettings, dense: float) -> float:
    """The limit on the time of a batch, if the dense network takes so long."""
    if settings.latency is not None:
        found = seconds_of(settings.latency)
        assert found is not None, "a time that was checked"
        return found
    return dense / (settings.speedup or 1.0)


def verify(dense: nn.Module, small: nn.Module, inputs: Tensor | Inputs, settings: PlanSettings) -> dict[str, Any]:
    """Whether the compressed network keeps its limit: exports both networks and times them in turns.

    `inputs` are any inputs, batch first; the batch and the seconds are those of the settings' terms. Returns the
    `limit` and what was `measured` for a batch, in seconds, whether the limit is `kept` (within 5 %), and for both
    networks the "median" and the "p95" over the turns. With a `speedup` the median of the ratios of the turns counts:
    both times are then in terms of the dense network's median. Without a limit on the time the dense network is the
    limit. Raises UntimedError if the runtime does not take a network.
    """
    place = place_of(settings, dense)
    found = Stopwatch(dense, inputs, place, settings.terms.seconds).of(small)
    both = {"dense": summary(found.dense, place.batch), "compressed": summary(found.compressed, place.batch)}
    before, after = both["dense"]["median"], both["compressed"]["median"]
    limit = limit_seconds(settings, before)
    measured = after if settings.latency is not None else found.share * before
    return {
        **{side: {key: value[key] for key in ("median", "p95")} for side, value in both.items()},
        "limit": limit,
        "measured": measured,
        "kept": measured <= limit * (1 + TOLERANCE),
    }
