"""Compares the compressed network with the dense one: latency (measured in turn), operations, memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from tspc.deploy import RUNTIMES, USUAL, Comparison, Graphs, check_runtimes, cost, families
from tspc.deploy.programs import take
from tspc.phases.context import Context
from tspc.phases.inputs import Example, example, for_ranges, in_order, tensors_of
from tspc.phases.phase import DeliveryPhase, Work
from tspc.store.schemas import COUNT, POSITIVE, SIZE, Number
from tspc.system.bounds import Bounds, out_of_range, shown
from tspc.traversal.copying import copied

_SIDE = {"median": POSITIVE, "p95": POSITIVE, "throughput": Number(0)}
_RATIOS = {"float32": Number(0), "int8?": Number(0)}
_COST = dict.fromkeys(("macs", "parameters", "weight_bytes", "peak_bytes"), COUNT)
_TIMING = {"runtime": str, "batch_size": SIZE}
FOUND = {
    "device": str,
    "threads": SIZE,
    "memory_batch": SIZE,
    "cost": {"dense": _COST, "compressed": _COST},
    "timings": [
        (
            _TIMING | {"skipped": str},
            _TIMING
            | {"skipped": None, "dense": _SIDE, "compressed": _SIDE, "speedup": Number(0)}
            | {"against?": ({"dense": _RATIOS, "compressed": _RATIOS}, None)},
        )
    ],
}
"""The schema of what `benchmark.json` says was found."""


@dataclass(frozen=True)
class Benchmark:
    """What and how long to measure. `seconds` is the time for one runtime and batch size, both networks together.

    `calibration` training images show the ranges of activations in int8.
    """

    batch_sizes: tuple[int, ...] = (1, 32)
    runtimes: tuple[str, ...] = USUAL
    seconds: float = 5.0
    calibration: int = 256

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        sizes = Bounds(1, 1e5)
        found = out_of_range(self, where, {"seconds": Bounds(0, 1e5), "calibration": Bounds(1, 1e6)})
        if not self.batch_sizes or any(size not in sizes for size in self.batch_sizes):
            found.append(f"{where}.batch_sizes={shown(self.batch_sizes)}: expected {sizes.of('whole numbers')}")
        if not self.runtimes or not set(self.runtimes) <= set(RUNTIMES):
            found.append(f"{where}.runtimes={shown(self.runtimes)}: expected a list of {', '.join(RUNTIMES)}")
        return found

    def check(self) -> None:
        """Raises ConfigError if a runtime was asked for that is not installed, unless it is one of the usual ones."""
        check_runtimes(self.runtimes)


def measure(
    dense: nn.Module, compressed: nn.Module, settings: Benchmark, example: Example, context: Context
) -> dict[str, Any]:
    """Measures both networks in eval mode, in every runtime and batch size; returns plain data."""
    largest = max(settings.batch_sizes)
    networks, inputs = in_order({"dense": dense.eval(), "compressed": compressed.eval()}, example)
    timings: list[dict[str, Any]] = []
    images = partial(for_ranges, settings.calibration, example, "benchmark", context)
    graphs = Graphs(networks, inputs, lambda: [tensors_of(batch) for batch in images()])
    total = len(set(settings.runtimes)) * len(settings.batch_sizes)
    with context.display.bar(f"{'benchmark':<9} {total} settings", total) as bar:
        for runtimes in families(settings.runtimes):
            comparison = Comparison(graphs, inputs, runtimes, settings.seconds)
            for size in settings.batch_sizes:
                timings += [timing.to_dict() for timing in comparison.at(size)]
                bar.advance(len(timings), f"{runtimes[-1]}, batch {size}")
    return {
        "inputs": example.source,
        "shape": [list(x.shape[1:]) for x in inputs],
        "device": _device(inputs[0].device),
        "threads": torch.get_num_threads(),
        "memory_batch": largest,
        "cost": {name: cost(network, take(inputs, largest)).to_dict() for name, network in networks.items()},
        "timings": timings,
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def benchmark_tables(found: dict[str, Any]) -> list[Table]:
    """Tables of the latency, of the precisions if there are several, and of the other costs of a forward pass."""
    several = [entry for entry in found["timings"] if entry.get("against")]
    return [_timing_table(found), *([_precision_table(several)] if several else []), _cost_table(found)]


def _timing_table(found: dict[str, Any]) -> Table:
    where = found["device"] if found["device"] != "cpu" else f"cpu, {found['threads']} threads"
    table = Table(title=f"Latency of a batch in milliseconds ({where})", title_justify="left")
    table.add_column("runtime")
    heads = ("batch", "dense\nmedian", "\np95", "compressed\nmedian", "\np95", "speedup", "compressed\ninputs/s")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    skipped: dict[tuple[str, str], list[str]] = {}
    for entry in found["timings"]:
        if entry["skipped"] is not None:
            skipped.setdefault((entry["runtime"], entry["skipped"]), []).append(str(entry["batch_size"]))
            continue
        dense, small = entry["dense"], entry["compressed"]
        times = (f"{1000 * side[key]:.3g}" for side in (dense, small) for key in ("median", "p95"))
        last = f"{entry['speedup']:.2f}×", f"{small['throughput']:,.0f}"
        table.add_row(entry["runtime"], str(entry["batch_size"]), *times, *last)
    notes = [f"{runtime}, batch {', '.join(sizes)}, was left out: {why}" for (runtime, why), sizes in skipped.items()]
    # As Text, because rich would read the brackets in `tspc[onnx]` as markup.
    table.caption, table.caption_justify = Text("\n".join(notes)) if notes else None, "left"
    return table


def _precision_table(timings: list[dict[str, Any]]) -> Table:
    """How fast each network is in each precision, against the dense one in float32 and in int8."""
    table = Table(title="Times as fast as the dense network, in the same turns", title_justify="left")
    table.add_column("runtime")
    for head in ("batch", "network", "milliseconds", "dense float32", "dense int8"):
        table.add_column(head, justify="left" if head == "network" else "right", no_wrap=True)
    for entry in timings:
        for side in ("dense", "compressed"):
            ratios = entry["against"][side]
            fast = [f"{ratios[base]:.2f}×" if base in ratios else "" for base in ("float32", "int8")]
            milliseconds = f"{1000 * entry[side]['median']:.3g}"
            table.add_row(entry["runtime"], str(entry["batch_size"]), side, milliseconds, *fast)
    return table


def _cost_table(found: dict[str, Any]) -> Table:
    table = Table(title="What a forward pass costs", title_justify="left")
    table.add_column("")
    for name in ("dense", "compressed", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    dense, small = found["cost"]["dense"], found["cost"]["compressed"]
    rows = {
        "macs": "multiply-accumulates for one input",
        "parameters": "parameters",
        "weight_bytes": "bytes of weights",
        "peak_bytes": f"bytes at the peak, batch {found['memory_batch']}",
    }
    for key, label in rows.items():
        table.add_row(label, f"{dense[key]:,}", f"{small[key]:,}", f"{small[key] / max(1, dense[key]):.3f}")
    return table


def _run(work: Work) -> dict[str, Any]:
    settings: Benchmark = work.settings
    dense, small = (work.context.place(copied(network)) for network in (work.reference, work.start))
    tried = example(small, work.network, max(settings.batch_sizes), work.context)
    return measure(dense, small, settings, tried, work.context)


PHASE = DeliveryPhase("benchmark", Benchmark, run=_run, check=Benchmark.check, schema=FOUND, tables=benchmark_tables)
