"""Any network in: thirty classification networks of torchvision and three encoders, compressed by every method.

    python -m benchmarks.networks [--networks alexnet,vit_b_16] [--methods svd,rtt] [--report]

Random weights (seeded), small images, batch norms that know them. Each network is decomposed to 0.3 of its layers'
parameters (weights alone, the same rate everywhere, two sweeps for the methods that iterate), then

- run: its answers against those of the dense network with the kernels that the factors stand for;
- run backward in training mode: every parameter of the tensorized layers has a finite gradient;
- saved and loaded into a fresh network: equal answers, bit for bit;
- exported to ONNX, and run by ONNX Runtime on another batch size than it was traced with.

The first and the last layer stay dense, as by default. A result is kept for each network and method in --out, and not
made again; --report prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import tspc
from benchmarks.common import machine, table
from tspc.compression.apply import apply_
from tspc.compression.planning import plan
from tspc.decompositions import METHODS, Decomposition, decomposition_from_dict, settings_of
from tspc.deploy import export
from tspc.deploy.programs import take
from tspc.errors import TspcError
from tspc.layers.forms import tensorized_layers
from tspc.layers.replacing import set_module
from tspc.models import NetworkSpec
from tspc.store.files import write_json
from tspc.traversal.copying import copied

RATE = 0.3
LIMIT = 1e-4
"""Of the largest difference of an answer, relative to the largest answer."""


@dataclass(frozen=True)
class Case:
    """A network and what it takes: images of `size` pixels, or with `tokens` that many word numbers."""

    name: str
    size: int = 64
    tokens: int = 0
    family: str = "torchvision"
    kwargs: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = tuple(METHODS)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        size = self.size if self.family != "torchvision" else None
        model = NetworkSpec(self.family, self.name, 10, image_size=size, kwargs=self.kwargs).build()
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():  # a head that would answer nothing
                nn.init.trunc_normal_(module.weight, std=0.02)
        return model

    def inputs(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.tokens:
            return torch.randint(0, 1000, (count, self.tokens), generator=generator)
        return torch.randn(count, 3, self.size, self.size, generator=generator)


ENCODER = ("svd", "rtk", "rtt")

SMALL = (
    *("squeezenet1_1", "squeezenet1_0", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "mobilenet_v2"),
    *("resnet18", "regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0", "mobilenet_v3_large", "shufflenet_v2_x1_0"),
    *("googlenet", "densenet121", "mnasnet1_0", "efficientnet_b1", "regnet_y_800mf", "resnet34"),
)
LARGE = ("swin_t", "convnext_tiny", "resnet50", "resnext50_32x4d", "efficientnet_v2_s", "swin_v2_t")

CASES = (
    *(Case(name) for name in SMALL),
    Case("vit_small_patch16_224", family="timm", methods=ENCODER),
    *(Case(name) for name in LARGE),
    Case("inception_v3", size=96),
    Case("alexnet"),
    Case("vit_b_16", kwargs={"image_size": 64}),
    Case("bert", tokens=16, family="transformers", methods=ENCODER),
    Case("vit_base_patch16_224", family="timm", methods=ENCODER),
    Case("maxvit_t", size=224),
    Case("wide_resnet50_2"),
    Case("vgg11_bn"),
)
"""Cheap ones first: every family of torchvision, some twice, and encoders whose attention is made of layers."""


def _method(name: str) -> Decomposition:
    sweeps = {"max_iterations": 2} if "max_iterations" in settings_of(name) else {}
    return decomposition_from_dict({"name": name} | sweeps)


@torch.no_grad()
def _know_(model: nn.Module, inputs: Tensor) -> None:
    """Lets batch norms take the statistics of the inputs, so that random layers after them see numbers of size 1."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    model.eval()
    for norm in norms:
        norm.train()
    model(inputs)
    model.eval()


def _distance(given: Tensor, wanted: Tensor) -> float:
    return float((given.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@torch.no_grad()
def _rebuilt(model: nn.Module, small: nn.Module) -> nn.Module:
    """The dense network with the kernels that the factors stand for."""
    dense = copied(model)
    for name, layer in tensorized_layers(small).items():
        module = copied(model.get_submodule(name))
        module.weight.copy_(layer.weight)  # type: ignore[operator]
        set_module(dense, name, module)
    return dense.eval()


def examine(case: Case, method: str, folder: Path) -> dict[str, Any]:
    """All checks of one network and one method; what fails is told under `failures`, never raised."""
    failures: list[str] = []
    started = time.monotonic()
    model, inputs = case.build(), case.inputs(4)
    _know_(model, inputs)
    small = copied(model)
    done = apply_(small, plan(model, _method(method), RATE, allocation="uniform"))
    result: dict[str, Any] = {
        "parameters": done.network_dense_params,
        "after": done.network_params,
        "rate": done.rate_reached,
        "layers": len(done.layers),
        "tensorized": len(done.tensorized),
        "dense": dict(Counter(layer.reason or "kept" for layer in done.layers if layer.method is None)),
        "decompose_seconds": time.monotonic() - started,
    }
    if done.rate_reached > RATE:
        failures.append(f"rate {done.rate_reached} is above {RATE}")
    with torch.no_grad():
        answer = small.eval()(inputs)
        wanted = _rebuilt(model, small)(inputs)
    result["rebuilt"] = _distance(answer, wanted)
    if answer.shape != wanted.shape or not result["rebuilt"] <= LIMIT:
        failures.append(f"answers differ from those of the rebuilt kernels by {result['rebuilt']:.2e}")
    failures += _saved(case, small, inputs, answer, folder)
    failures += _backward(small, inputs)
    try:
        result["onnx"] = export(small, folder / "model.onnx", take((inputs,), 3), tolerance=LIMIT).relative
    except TspcError as error:
        failures.append(str(error))
    result["seconds"] = time.monotonic() - started
    return result | {"failures": failures}


def _saved(case: Case, small: nn.Module, inputs: Tensor, answer: Tensor, folder: Path) -> list[str]:
    tspc.save(small, folder / "small.safetensors")
    loaded = tspc.load(folder / "small.safetensors", case.build()).eval()
    with torch.no_grad():
        return [] if torch.equal(loaded(inputs), answer) else ["the loaded network answers otherwise"]


def _backward(small: nn.Module, inputs: Tensor) -> list[str]:
    trained = copied(small).train()
    trained(inputs).square().mean().backward()
    return [
        f"{name}.{entry} has {'no' if p.grad is None else 'an infinite'} gradient"
        for name, layer in tensorized_layers(trained).items()
        for entry, p in layer.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]


def row(case: Case, found: dict[str, dict[str, Any]]) -> list[str]:
    """A line of the table: what passed, the worst differences, what stayed dense."""
    good = [method for method, result in found.items() if not result["failures"]]
    whole = [result for result in found.values() if "rebuilt" in result]
    wrong = [f"**{m}: {'; '.join(r['failures'])}**" for m, r in found.items() if r["failures"]]
    first = whole[0] if whole else None
    differences = [[r[key] for r in whole if key in r] for key in ("rebuilt", "onnx")]
    name = case.name if case.family == "torchvision" else f"{case.family}: {case.name}"
    dense: Counter[str] = Counter()
    for reason, count in ({} if first is None else first["dense"]).items():
        dense[re.sub(r" \(\d+ groups\)", "", reason)] += count
    reasons = ", ".join(f"{count} {reason}" for reason, count in dense.items())
    return [
        name,
        "" if first is None else f"{first['parameters'] / 1e6:.1f}",
        "" if first is None else f"{first['tensorized']}/{first['layers']}",
        f"{len(good)}/{len(case.methods)}" + (f" ({len(found)} run)" if len(found) < len(case.methods) else ""),
        *(f"{max(values):.0e}" if values else "" for values in differences),
        f"{sum(r['seconds'] for r in whole):.0f}",
        "; ".join([reasons, *wrong]),
    ]


def run(case: Case, method: str, out: Path) -> None:
    path = out / f"{case.name}-{method}.json"
    if path.exists():
        return
    folder = out / "files"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = examine(case, method, folder)
    except Exception as error:  # a crash is a finding of this benchmark
        result = {"failures": [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]}
    write_json(path, result)
    print(f"{case.name} {method}: {json.dumps(result)}", flush=True)


def report(cases: list[Case], out: Path) -> str:
    head = "network, parameters (million), tensorized layers, methods that passed, rebuilt against run, ONNX Runtime"
    rows = []
    for case in cases:
        paths = {method: out / f"{case.name}-{method}.json" for method in case.methods}
        found = {method: json.loads(path.read_text()) for method, path in paths.items() if path.exists()}
        rows.append(row(case, found))
    return table([*head.split(", "), "seconds", "stays dense"], rows)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--networks", default=",".join(case.name for case in CASES))
    arguments.add_argument("--methods", default=",".join(METHODS))
    arguments.add_argument("--report", action="store_true", help="only print the table of what is there")
    arguments.add_argument("--out", default="outputs/networks")
    options = arguments.parse_args()
    cases = [case for case in CASES if case.name in options.networks.split(",")]
    # Method after method: stopped early, it has been through as many networks as it could.
    for method in [] if options.report else options.methods.split(","):
        for case in cases:
            if method in case.methods:
                run(case, method, Path(options.out))
    print(f"\n{machine(0)}\n\n{report(cases, Path(options.out))}")


if __name__ == "__main__":
    main()
