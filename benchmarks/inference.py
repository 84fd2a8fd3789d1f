"""Seconds for a batch: the dense network, the seven methods, tensorly-torch's factorized layers.

    pip install -e '.[benchmark]'
    python -m benchmarks.inference --network resnet50 --rate 0.1 --methods dense,svd,tk --runtimes channels_last,onnx

Networks and factors are random, for only speed counts here: every layer has the rate asked for (`allocation=uniform`),
its ranks in multiples of `--rank-multiple` (reshaped methods: of a fourth of it), its path by the cost model. Batch
norms are folded, in the dense network too; tensorly-torch's layers (`tltorch-cp`, `-tucker`, `-tt`, with their own
ranks for the same rate) keep them. Runtimes: `eager`, `channels_last`, `compile` (channels last), `onnx` (ONNX
Runtime). `--threads 1 --clock cpu` takes the processor's time rather than the wall's: for machines on which something
else runs too.

A machine's speed drifts, so every network runs in turn with the dense one: in each of `--rounds` rounds both run once
to warm the caches and RUNS times for the clock, and the round gives one ratio of their medians. Printed are the median
of the ratios, the middle half of them, and the medians of both networks' seconds; of the dense network against itself,
too, which shows how far to trust the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import tspc
from benchmarks.common import machine, table
from tspc.compression.plan import Plan
from tspc.decompositions import METHODS
from tspc.deploy.folding import fold_batch_norms
from tspc.layers.dense import kernel_of
from tspc.layers.forms import untrained
from tspc.layers.replacing import set_module
from tspc.models import NetworkSpec
from tspc.traversal.copying import copied

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet50": (torchvision.models.resnet50, 8, 224),
    "resnet32": (lambda: NetworkSpec("builtin", "resnet32", 10).build(), 128, 32),
    "vit_b_16": (torchvision.models.vit_b_16, 8, 224),
}
"""The network, its batch size and its image size."""
TLTORCH = {"tltorch-cp": "cp", "tltorch-tucker": "tucker", "tltorch-tt": "tt"}
ALL = ("dense", *METHODS, *TLTORCH)
RUNS = 3


def planned(model: nn.Module, method: str, options: argparse.Namespace, images: Tensor) -> Plan:
    multiple = max(1, options.rank_multiple // 4) if method.startswith("r") else options.rank_multiple
    return tspc.plan(
        model,
        method,
        options.rate,
        allocation="uniform",
        rank_multiple=multiple,
        objective=options.objective,
        paths=options.paths,
        example=images[:1],
    )


@torch.no_grad()
def tensorized_(model: nn.Module, plan: Plan) -> nn.Module:
    """Random factors whose kernels have the size of usual initial ones: numbers too small would slow the processor."""
    for row in plan.tensorized:
        assert row.method is not None
        assert row.rank is not None
        dense: Any = model.get_submodule(row.name)
        layer: Any = untrained(dense, row.method, row.rank, row.path)
        for parameter in layer.parameters():
            parameter.normal_()
        kernel = kernel_of(layer)
        layer.factor_tensors()[0].mul_(kernel[0].numel() ** -0.5 / kernel.std())
        if layer.bias is not None:
            layer.bias.zero_()
        set_module(model, row.name, layer)
    return model.eval()


def factorized_(model: nn.Module, form: str, rate: float, rows: Plan) -> nn.Module:
    """tensorly-torch's layers in the place of those that tspc would tensorize."""
    tl, utils = importlib.import_module("tltorch"), importlib.import_module("tltorch.utils")
    for row in rows.budgeted:
        dense: Any = model.get_submodule(row.name)
        if isinstance(dense, nn.Linear):
            # Not `from_linear`, which would decompose random weights for hours.
            # `implementation="factorized"` wants 380 GB for a ViT.
            inputs, outputs = utils.get_tensorized_shape(
                dense.in_features, dense.out_features, order=2, min_dim=2, verbose=False
            )
            has_bias = dense.bias is not None
            layer: Any = tl.FactorizedLinear(
                inputs,
                outputs,
                bias=has_bias,
                factorization={"tt": "blocktt"}.get(form, form),
                rank=rate,
                implementation="reconstructed",
            )
            if has_bias:
                layer.bias.zero_()
        else:
            layer = tl.FactorizedConv(
                dense.in_channels,
                dense.out_channels,
                dense.kernel_size,
                order=2,
                stride=dense.stride,
                padding=dense.padding,
                bias=dense.bias is not None,
                factorization=form,
                rank=rate,
                implementation="factorized",
            )
        layer.weight.normal_(0.0, dense.weight[0].numel() ** -0.5)
        set_module(model, row.name, layer)
    return model.eval()


def runner(model: nn.Module, images: Tensor, runtime: str, threads: int) -> Callable[[], Any]:
    """A call that runs a batch."""
    model = copied(model)
    if runtime in ("channels_last", "compile"):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if runtime == "compile":
        model = torch.compile(model)  # type: ignore[assignment]
    if runtime != "onnx":
        return lambda: model(images)
    import onnxruntime

    file = io.BytesIO()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused attention has no form in ONNX
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), file, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    torch.backends.mha.set_fastpath_enabled(True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)


@dataclass(frozen=True)
class Timing:
    """Of one network in one runtime: seconds for a batch, and of the dense one beside it; their ratio in each round."""

    own: float
    dense: float
    ratios: tuple[float, ...]

    @property
    def faster(self) -> float:
        """How many times as fast as the dense network."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return f"{self.own:.3f} of {self.dense:.3f} ({self.faster:.2f}×, {low:.2f} to {high:.2f})"


def timed(run: Callable[[], Any], dense: Callable[[], Any], options: argparse.Namespace) -> Timing:
    """Both in turn."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter

    def seconds(call: Callable[[], Any]) -> float:
        call()
        taken: list[float] = []
        for _ in range(RUNS):
            begun = clock()
            call()
            taken.append(clock() - begun)
        return statistics.median(taken)

    pairs = [(seconds(run), seconds(dense)) for _ in range(options.rounds)]
    own, beside = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Timing(own, beside, tuple(d / o for o, d in pairs))


def network(method: str, options: argparse.Namespace, images: Tensor) -> tuple[nn.Module, str]:
    """The network to time, and what it is."""
    torch.manual_seed(options.seed)
    model = NETWORKS[options.network][0]().eval()
    if method == "dense":
        return fold_batch_norms(model, images[:1]), "1"
    if method in TLTORCH:
        before = sum(p.numel() for p in model.parameters())
        rows = planned(model, "svd", options, images)
        model = factorized_(model, TLTORCH[method], options.rate, rows)
        after = sum(p.numel() for p in model.parameters())
        return model, f"{(after - before + rows.dense_params) / rows.dense_params:.3f}"
    plan = planned(model, method, options, images)
    return fold_batch_norms(tensorized_(model, plan), images[:1]), f"{plan.rate_reached:.3f}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--network", choices=NETWORKS, default="resnet50")
    arguments.add_argument("--rate", type=float, default=0.1)
    arguments.add_argument("--methods", default=",".join(ALL))
    arguments.add_argument("--runtimes", default="eager,channels_last,onnx")
    arguments.add_argument("--rank-multiple", type=int, default=8)
    arguments.add_argument("--objective", default="parameters")
    arguments.add_argument("--paths", default="model")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    if options.rounds < 2:
        arguments.error("--rounds takes at least 2: one ratio has no middle half")
    if options.clock == "cpu" and options.threads != 1:
        arguments.error("--clock cpu adds up the time of all threads: it needs --threads 1")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    _, batch, size = NETWORKS[options.network]
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(options.seed))
    runtimes = options.runtimes.split(",")
    dense = network("dense", options, images)[0]
    beside: dict[str, Callable[[], Any]] = {}
    timings: dict[str, dict[str, Timing]] = {}
    rates: dict[str, str] = {}
    for method in options.methods.split(","):
        model, rates[method] = network(method, options, images)
        found = timings[method] = {}
        for runtime in runtimes:
            try:
                if runtime not in beside:
                    beside[runtime] = runner(dense, images, runtime, options.threads)
                run = runner(model, images, runtime, options.threads)
                found[runtime] = timed(run, beside[runtime], options)
            except Exception as error:  # what a library cannot do is part of the table
                print(f"  {method} in {runtime}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        print(method, rates[method], *(f"{runtime} {timing}" for runtime, timing in found.items()), flush=True)
    rows = [
        [f"`{method}`", rates[method], *(str(found.get(runtime, "failed")) for runtime in runtimes)]
        for method, found in timings.items()
    ]
    print(
        f"\n{options.network}, rate {options.rate:g}, batches of {batch} at {size}², {options.threads} threads, ",
        end="",
    )
    print(f"rank multiple {options.rank_multiple}, objective {options.objective}. {machine(options.seed)}\n")
    print(table(["", "rate reached", *(f"{r}, s of dense s (×, middle half)" for r in runtimes)], rows))


if __name__ == "__main__":
    main()
