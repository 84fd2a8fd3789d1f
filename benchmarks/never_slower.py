"""`objective=latency`: is any network slower than the dense one in the exported file?

    pip install -e '.[benchmark]'
    python -m benchmarks.never_slower [--networks alexnet,vit_b_16] [--methods svd,tk] [--rate 0.2] [--report]

The networks of `benchmarks.networks`: thirty of torchvision and three encoders, random weights, small images, batches
of 1. Each is planned with `objective=latency` for ONNX Runtime (errors of the weights), decomposed, exported, and timed
in turns with the dense one. Printed is the median of compressed ÷ dense over the turns. `noise` is the dense network
against itself in as many turns: how far from 1 it is. A network counts as slower if its ratio is above 1.02 and above
what the noise explains (1 + 2 · noise).

What was found is kept for each network and method in --out, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import kept, machine, table
from benchmarks.networks import CASES, Case
from tspc.compression.apply import tensorized
from tspc.compression.network_times import Stopwatch, place_of
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.errors import TspcError

METHODS = ("svd", "tk")
SLOWER = 1.02


def examine(case: Case, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """The ratio of one network by one method, and the noise."""
    model, inputs = case.build().eval(), case.inputs(1)
    terms = {"runtime": options.runtime, "threads": options.threads, "seconds": options.seconds}
    asked = PlanSettings.of(method, options.rate, objective="latency", **terms)
    started = time.monotonic()
    made = plan(model, asked, example=inputs)
    planned = time.monotonic() - started
    small, done = tensorized(model, made, shares_tensors=True)
    watch = Stopwatch(model, inputs, place_of(asked, model), options.seconds)
    found, noise = watch.of(small), watch.of(None)
    return {
        "ratio": found.share,
        "noise": abs(noise.share - 1),
        "dense": statistics.median(found.dense),
        "compressed": statistics.median(found.compressed),
        "rate": done.rate_reached,
        "layers": len(done.layers),
        "tensorized": len(done.tensorized),
        "paths": done.paths,
        "promise": made.promise,
        "seconds": planned,
    }


def run(case: Case, method: str, options: argparse.Namespace) -> dict[str, Any]:
    try:
        return examine(case, method, options)
    except (TspcError, RuntimeError) as error:  # a network that cannot be planned is a finding, too
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def row(case: Case, found: dict[str, dict[str, Any]]) -> list[str]:
    """A line of the table; a ratio that is slower is bold."""

    def shown(result: dict[str, Any]) -> str:
        if "failed" in result:
            return result["failed"]
        is_slower = result["ratio"] > max(SLOWER, 1 + 2 * result["noise"])
        return f"**{result['ratio']:.3f}**" if is_slower else f"{result['ratio']:.3f}"

    done = [each for each in found.values() if "failed" not in each]
    best = min(done, key=lambda each: each["ratio"], default=None)
    name = case.name if case.family == "torchvision" else f"{case.family}: {case.name}"
    dense = "" if best is None else f"{1000 * best['dense']:.3g}"
    layers = "" if best is None else f"{best['tensorized']}/{best['layers']}"
    noise = f"{max(each['noise'] for each in done):.3f}" if done else ""
    seconds = f"{sum(each['seconds'] for each in done):.0f}"
    ratios = [shown(found[method]) if method in found else "" for method in METHODS]
    return [name, dense, layers, *ratios, "" if best is None else shown(best), noise, seconds]


def report(cases: list[Case], out: Path) -> str:
    rows = []
    for case in cases:
        paths = {method: out / f"{case.name}-{method}.json" for method in METHODS}
        found = {method: json.loads(path.read_text()) for method, path in paths.items() if path.exists()}
        if found:
            rows.append(row(case, found))
    head = ("network", "dense (ms)", "tensorized", *(f"`{method}`" for method in METHODS), "best", "noise")
    return table([*head, "seconds of the plans"], rows)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--networks", default=",".join(case.name for case in CASES))
    arguments.add_argument("--methods", default=",".join(METHODS))
    arguments.add_argument("--rate", type=float, default=0.2)
    arguments.add_argument("--runtime", default="onnx")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--seconds", type=float, default=3.0)
    arguments.add_argument("--report", action="store_true", help="only print the table of what is there")
    arguments.add_argument("--out", default="outputs/never_slower")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    cases = [case for case in CASES if case.name in options.networks.split(",")]
    settings = f"{options.runtime}-rate{options.rate:g}-threads{options.threads}-seconds{options.seconds:g}"
    out = Path(options.out, settings)
    for case in [] if options.report else cases:
        for method in options.methods.split(","):
            kept(out, f"{case.name}-{method}", lambda c=case, m=method: run(c, m, options))
    print(
        f"\nRate {options.rate:g}, {options.runtime}, {options.threads} threads. {machine(0)}\n\n{report(cases, out)}"
    )


if __name__ == "__main__":
    main()
