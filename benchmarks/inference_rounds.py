"""Times of networks in turn, and the ratios of a network and the dense ones in the same rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inference_networks import DENSE
from tspc.deploy import Graphs
from tspc.deploy.calls import EXTRAS, FLOAT32, Unusable, call, family, precision
from tspc.deploy.exporting import INT8
from tspc.deploy.runtimes import BFLOAT16
from tspc.system.precision import rough
from tspc.traversal.copying import copied

TORCH = ("eager", "channels_last", "compile", "eager-bfloat16", "compile-bfloat16")
OTHERS = ("onnx", "onnx-int8", "openvino", "openvino-bfloat16", "openvino-int8")
RUNTIMES = (*TORCH, *OTHERS)
BASE = "onnx"
"""The runtime of the dense float32 network that every network is compared with."""
RUNS = 3

Times = Mapping[str, Sequence[float]]


def library(runtime: str) -> str:
    """What the runtimes that are timed in the same rounds have in common."""
    return "torch" if runtime in TORCH else family(runtime)


def bases(runtime: str) -> dict[str, str]:
    """For each precision the runtime of the dense network that a network in `runtime` is compared with."""
    own = family(runtime)
    return {FLOAT32: own} | ({INT8: f"{own}-{INT8}"} if own in EXTRAS else {}) | {BASE: BASE}


def runner(graphs: Graphs, side: str, runtime: str, images: Tensor) -> Callable[[], object]:
    """A call that runs a batch in one of `RUNTIMES`. Raises Unusable."""
    if runtime not in TORCH:
        return call(graphs, side, runtime, (images,))
    model: nn.Module = copied(graphs.networks[side])
    if runtime != "eager":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if precision(runtime) == BFLOAT16:
        if rough(images.device) != torch.bfloat16:
            raise Unusable("this processor has no bfloat16")
        model, images = model.bfloat16(), images.bfloat16()
    how = "compile" if family(runtime) == "compile" else "eager"
    return call(Graphs({side: model}, (images,)), side, how, (images,))


def rounds_of(runs: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """For each of `runs` the seconds of each round: the median of RUNS calls, after one that warms the caches."""
    found: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        # Each network finds the caches as the one before left them, so the order alternates.
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            runs[i]()
            taken: list[float] = []
            for _ in range(RUNS):
                begun = clock()
                runs[i]()
                taken.append(clock() - begun)
            found[i].append(float(f"{statistics.median(taken):.5g}"))
    return found


def timed(
    own: Callable[[str], Callable[[], object]],
    dense: Callable[[str], Callable[[], object]],
    runtimes: Sequence[str],
    rounds: int,
    is_cpu: bool,
) -> dict[str, Any]:
    """Seconds of each round of a network in `runtimes`, and of the dense ones beside it, by runtime.

    `own` and `dense` give for a runtime the call that runs the batch, or raise. Of what a library cannot do `failed`
    says why.
    """
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for runtime in runtimes:
        try:
            runs["own", runtime] = own(runtime)
        except Exception as error:  # part of the table
            failed[runtime] = f"{type(error).__name__}: {str(error)[:200]}"
    for runtime in dict.fromkeys(base for name in runtimes for base in bases(name).values()):
        try:
            runs[DENSE, runtime] = dense(runtime)
        except Unusable as error:  # not installed
            failed[f"{DENSE} {runtime}"] = str(error)
    times = rounds_of(list(runs.values()), rounds, time.process_time if is_cpu else time.perf_counter)
    by_key = dict(zip(runs, times, strict=True))
    sides = {side: {runtime: t for (of, runtime), t in by_key.items() if of == side} for side in ("own", DENSE)}
    return {**sides, "failed": failed}


def ratios(runtime: str, own: Times, dense: Times) -> dict[str, list[float]]:
    """How many times as fast as the dense network, in each round; by the key of `bases`."""
    return {
        key: [slow / fast for slow, fast in zip(dense[base], own[runtime], strict=True)]
        for key, base in bases(runtime).items()
        if base in dense
    }


def shown(values: Sequence[float] | None) -> str:
    """The median of the ratios and their middle half."""
    if not values:
        return ""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f}× ({low:.2f} to {high:.2f})"
