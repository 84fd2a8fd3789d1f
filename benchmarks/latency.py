"""Limits on the time: is what `latency=…` promises kept by the exported file?

    pip install -e '.[benchmark,openvino]'
    python -m benchmarks.latency [--networks resnet50,lite0 --runtimes onnx,openvino --fractions 0.75,0.5,0.3 --runs 10]

ResNet-50 (random weights) and EfficientNet-Lite0 (ImageNet weights), images of 224², batches of 1. In every run the
dense network is timed, the limit is a fraction of that, and the network is planned, decomposed and exported; then the
file is timed in turns with the dense one for --seconds. The errors of the layers are those of the weights. A limit is
kept if the file takes at most 5 % more. If it is refused, the time that the refusal advises is asked for: a refusal
is right if that is kept, and the fastest time that was measured is above the limit. With `--goal speedup` the limit is
a ratio, so that a machine whose speed drifts says something, too.

Every run is kept in --out, and not repeated: a long benchmark can be made in parts. `--report` prints what is there.
Run it on a quiet machine; with `taskset -c 1` and --threads 1 it needs one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.common import kept, machine, table
from benchmarks.no_training import lite0_network
from tspc.compression.apply import tensorized
from tspc.compression.curves import error_curves
from tspc.compression.error_curve import Curves
from tspc.compression.network_times import Stopwatch, place_of, verify
from tspc.compression.outline import outline
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.compression.time_plans import ROOM
from tspc.errors import ConfigError, InfeasibleTimeError

NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet50": torchvision.models.resnet50, "lite0": lite0_network}
SIZE = 224


@cache
def network(name: str, method: str, seed: int) -> tuple[nn.Module, Curves]:
    """A network in eval mode, and the error curves of its weights."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    settings = PlanSettings.of(method, speedup=2.0)
    return model, error_curves(model, outline(model, settings).layers, settings.method, None, widths=settings.widths)


def run(name: str, runtime: str, fraction: float, options: argparse.Namespace) -> dict[str, Any]:
    """One plan under a limit of a fraction of the dense network's time, and the time of its file."""
    model, curves = network(name, options.method, options.seed)
    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(options.seed))
    terms: dict[str, Any] = {"runtime": runtime, "threads": options.threads, "seconds": options.seconds}
    start = PlanSettings.of(options.method, speedup=1 / fraction, **terms)
    dense = Stopwatch(model, x, place_of(start, model), options.seconds).dense_seconds
    result = attempt(model, curves, x, fraction, dense, terms, options)
    if "nearest" in result:
        nearest = attempt(model, curves, x, ROOM * result["nearest"] / dense, dense, terms, options)
        result["is_right"] = result["nearest"] > result["limit"] and nearest.get("kept", False)
        result["at_nearest"] = nearest
    return {**result, "dense_before": dense}


def attempt(
    model: nn.Module,
    curves: Curves,
    x: torch.Tensor,
    fraction: float,
    dense: float,
    terms: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """A plan under a limit of a fraction of the dense time, and the time of its file; or why it was refused."""
    limit = fraction * dense
    goal = {"speedup": 1 / fraction} if options.goal == "speedup" else {"latency": f"{1e6 * limit:.6g}us"}
    asked = PlanSettings.of(options.method, **goal, **terms)
    started = time.monotonic()
    try:
        made = plan(model, asked, curves=curves, example=x)
    except InfeasibleTimeError as error:
        return {"limit": limit, "nearest": error.fastest, "seconds": time.monotonic() - started, "message": str(error)}
    except ConfigError as error:
        return {"limit": limit, "seconds": time.monotonic() - started, "message": str(error)}
    seconds = time.monotonic() - started
    small, done = tensorized(model, made, shares_tensors=True)
    found = verify(model, small, x, asked)
    errors = {"error": done.output_error, "rate": done.rate_reached}
    return {**found, "seconds": seconds, "promise": made.promise, **errors}


def row(name: str, runtime: str, fraction: float, found: list[dict[str, Any]]) -> list[str]:
    done = [each for each in found if "kept" in each]
    shares = [each["measured"] / each["limit"] for each in done]
    refused = [each for each in found if "kept" not in each]
    tails = [each["compressed"]["p95"] / each["compressed"]["median"] for each in done]
    cells = [
        f"{1000 * statistics.median(each['dense_before'] for each in found):.3g}",
        f"{sum(each['kept'] for each in done)}/{len(done)}",
        f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})" if done else "",
        f"{statistics.median(tails):.3f}" if done else "",
        f"{sum(each.get('is_right', False) for each in refused)}/{len(refused)}" if refused else "",
        f"{statistics.median(each['rate'] for each in done):.3f}" if done else "",
        f"{statistics.median(each['seconds'] for each in found):.0f}",
    ]
    return [name, runtime, f"{fraction:g}", *cells]


def report(options: argparse.Namespace) -> str:
    rows = []
    for name in options.networks.split(","):
        for runtime in options.runtimes.split(","):
            for fraction in map(float, options.fractions.split(",")):
                paths = [options.out / f"{label(name, runtime, fraction, i)}.json" for i in range(options.runs)]
                found = [json.loads(path.read_text()) for path in paths if path.exists()]
                if found:
                    rows.append(row(name, runtime, fraction, found))
    head = "network,runtime,fraction of dense,dense (ms),kept,file ÷ limit,p95 ÷ median,refusals that are right,rate"
    return table([*head.split(","), "seconds of a plan"], rows)


def label(name: str, runtime: str, fraction: float, number: int) -> str:
    return f"{name}-{runtime}-{fraction:g}-{number}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--networks", default=",".join(NETWORKS))
    arguments.add_argument("--runtimes", default="onnx,openvino")
    arguments.add_argument("--fractions", default="0.75,0.5,0.3")
    arguments.add_argument("--runs", type=int, default=10)
    arguments.add_argument("--method", default="svd")
    arguments.add_argument("--goal", choices=("latency", "speedup"), default="latency")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--seconds", type=float, default=5.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--report", action="store_true", help="only print the table of what is there")
    arguments.add_argument("--out", default="outputs/latency")
    options = arguments.parse_args()
    settings = f"{options.method}-{options.goal}-threads{options.threads}-seconds{options.seconds:g}-seed{options.seed}"
    options.out = Path(options.out, settings)
    os.environ.setdefault("XDG_CACHE_HOME", str(options.out.absolute() / "cache"))
    torch.set_num_threads(options.threads)
    for number in [] if options.report else range(options.runs):
        for name in options.networks.split(","):
            for runtime in options.runtimes.split(","):
                for fraction in map(float, options.fractions.split(",")):
                    make = lambda n=name, r=runtime, f=fraction: run(n, r, f, options)  # noqa: E731
                    kept(options.out, label(name, runtime, fraction, number), make)
    head = f"Method {options.method}, goal {options.goal}, {options.threads} threads. {machine(options.seed)}"
    print(f"\n{head}\n\n{report(options)}")


if __name__ == "__main__":
    main()
