"""Latency of two networks side by side, in the installed runtimes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tspc.deploy.calls import EXTRAS, FLOAT32, USUAL, Run, Sessions, Unusable, call, family
from tspc.deploy.exporting import INT8
from tspc.deploy.graphs import Graphs
from tspc.deploy.programs import Inputs, take
from tspc.system import extras

SIDES = ("dense", "compressed")
LEAST_REPEATS = 5


@dataclass(frozen=True)
class Timing:
    """One runtime at one batch size: seconds for a batch, of the dense and the compressed network, timed in turn.

    `speedup` is the median of dense ÷ compressed over the turns, both in this runtime. `against` is there for a family
    with several precisions: for each of both networks how many times it is as fast as the dense network in float32 and,
    if it was timed, in int8, in the same turns. If the runtime could not be used, `skipped` says why, and there are no
    numbers.
    """

    runtime: str
    batch_size: int
    repeats: int = 0
    dense: dict[str, float] | None = None
    compressed: dict[str, float] | None = None
    speedup: float | None = None
    skipped: str | None = None
    against: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def families(runtimes: Sequence[str]) -> list[tuple[str, ...]]:
    """The runtimes by family, in order. The precisions of a family are timed together."""
    names = dict.fromkeys(map(family, runtimes))
    return [tuple(dict.fromkeys(runtime for runtime in runtimes if family(runtime) == name)) for name in names]


def check_runtimes(runtimes: Sequence[str]) -> None:
    """Raises ConfigError if a runtime that is not among the usual ones is asked for, but not installed."""
    for runtime in runtimes:
        if runtime not in USUAL:
            extras.require(EXTRAS[family(runtime)], f"the runtime {runtime} (phase.benchmark.runtimes)")


def compare(
    dense: nn.Module, compressed: nn.Module, inputs: Inputs, batch_size: int, runtime: str, seconds: float
) -> Timing:
    """`Comparison.at` for a single runtime and batch size."""
    return Comparison(Graphs({"dense": dense, "compressed": compressed}, inputs), inputs, (runtime,), seconds).at(
        batch_size
    )[0]


class Comparison:
    """Two networks, "dense" and "compressed", in the runtimes of one family.

    Each batch size is timed in turns, with at least five of them, for about `seconds` for each runtime. `inputs` are on
    the device of the networks.
    """

    def __init__(self, graphs: Graphs, inputs: Inputs, runtimes: Sequence[str], seconds: float) -> None:
        self.graphs, self.inputs, self.seconds = graphs, inputs, seconds
        self.runtimes = tuple(runtimes)
        self._sessions: Sessions = {}

    @torch.no_grad()
    def at(self, batch_size: int) -> list[Timing]:
        """A timing for each runtime, after a warm-up. If one cannot run the batch, `Timing.skipped` says why."""
        batch = take(self.inputs, batch_size)
        device = batch[0].device
        runs: dict[tuple[str, str], Run] = {}
        skipped: dict[str, str] = {}
        try:
            for runtime in self.runtimes:
                try:
                    runs |= {(side, runtime): self._warm(side, runtime, batch) for side in SIDES}
                except Unusable as reason:
                    skipped[runtime] = str(reason)
            base = family(self.runtimes[0])
            if runs and ("dense", base) not in runs:
                runs["dense", base] = self._warm("dense", base, batch)
            seconds = self.seconds * len(self.runtimes)
            timed = list(turns(list(runs.values()), device, seconds)) if runs else []
        except Unusable as reason:  # no float32 to compare with
            return [Timing(runtime, batch_size, skipped=str(reason)) for runtime in self.runtimes]
        finally:
            if "compile" in self.runtimes:
                torch.compiler.reset()
        times = {key: [turn[place] for turn in timed] for place, key in enumerate(runs)}
        return [
            Timing(runtime, batch_size, skipped=skipped[runtime])
            if runtime in skipped
            else _timing(runtime, batch_size, times)
            for runtime in self.runtimes
        ]

    def _warm(self, side: str, runtime: str, batch: Inputs) -> Run:
        """A call that runs the batch, and has run it. Raises Unusable."""
        run = call(self.graphs, side, runtime, batch, self._sessions)
        for _ in range(2):
            _timed(run, batch[0].device)
        return run


def _timing(runtime: str, batch_size: int, times: dict[tuple[str, str], list[float]]) -> Timing:
    """`times` has the seconds of each turn, for each network and runtime of the family."""
    dense, small = (times[side, runtime] for side in SIDES)
    summaries = summary(dense, batch_size), summary(small, batch_size)
    speedup = _ratio(dense, small)
    against = None
    name = family(runtime)
    if len({of for _, of in times}) > 1:
        bases = {FLOAT32: ("dense", name), INT8: ("dense", f"{name}-{INT8}")}
        against = {
            side: {base: _ratio(times[key], times[side, runtime]) for base, key in bases.items() if key in times}
            for side in SIDES
        }
    return Timing(runtime, batch_size, len(dense), *summaries, speedup, against=against)


def _ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def turns(runs: Sequence[Run], device: torch.device, seconds: float) -> Iterator[list[float]]:
    """Times all calls in each turn, for so many seconds, so that other work of the machine affects all of them."""
    end, done = time.perf_counter() + seconds, 0
    while done < LEAST_REPEATS or time.perf_counter() < end:
        # Each call finds the caches as the one before left them, so the order alternates.
        if done % 2:
            yield [_timed(run, device) for run in reversed(runs)][::-1]
        else:
            yield [_timed(run, device) for run in runs]
        done += 1


def _timed(run: Run, device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def summary(times: list[float], batch_size: int) -> dict[str, float]:
    """Seconds, and inputs a second at the median."""
    ordered = sorted(times)
    median = statistics.median(ordered)
    p95 = ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]
    return {"median": median, "p95": p95, "throughput": batch_size / median}
