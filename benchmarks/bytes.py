"""Accuracy at a share of the bytes, without a gradient step: `size=` against dense networks in 8 and 4 bits.

    python -m benchmarks.bytes --data CIFAR --weights resnet32.pt
    python -m benchmarks.bytes --network lite0 --data IMAGES --sizes 0.25,0.2,0.15 --dense 8,6

Bytes are those of the whole network as saved, with scales, biases and norms, divided by those of float32. Rows
`nearest` are dense kernels rounded to nearest, without a look at the images. The accuracy is that of all test images;
512 training images calibrate (`lite0`: 200). Every run is kept in --out, and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import kept, machine, table
from benchmarks.no_training import accuracy, cifar, lite0
from tspc.calibration import Calibration
from tspc.calibration.samples import Samples
from tspc.compression.apply import tensorized
from tspc.compression.curves import error_curves
from tspc.compression.form import DENSE
from tspc.compression.integers import state_bytes
from tspc.compression.outline import outline
from tspc.compression.plan import Plan
from tspc.compression.planning import plan, planned
from tspc.compression.settings import PlanSettings
from tspc.errors import InfeasibleRateError
from tspc.layers.forms import tensorized_layers
from tspc.quantization.factors import nearest
from tspc.training import place


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out) / options.network
        self.model, images, self.test = (cifar if options.network == "resnet32" else lite0)(options)
        place(self.model, torch.device(options.device)).eval()
        compensate = options.network == "resnet32"  # see benchmarks.no_training
        self.samples = Samples(images, Calibration(samples=len(images), compensate=compensate))
        self.curves: dict[str, Any] = {}

    def sized(self, method: str, size: str) -> dict[str, Any]:
        """The network that fits a share of the bytes."""

        def make() -> dict[str, Any]:
            asked = PlanSettings.of(method, size=size)
            sketch = outline(self.model, asked)
            if method not in self.curves:
                started = time.monotonic()
                self.curves[method] = (
                    error_curves(self.model, sketch.layers, asked.method, self.samples, widths=asked.widths),
                    time.monotonic() - started,
                )
            curves, seconds = self.curves[method]
            return self._measured(planned(self.model, sketch, curves, None), seconds)

        return kept(self.out, f"{method}-{size}", make)

    def dense(self, bits: int, rounds_to_nearest: bool) -> dict[str, Any]:
        """The dense network in a few bits."""

        def make() -> dict[str, Any]:
            made = plan(self.model, DENSE, bits=bits, rate_unit="bytes", rate=1.0)
            rows = tuple(row if row.method is None else dataclasses.replace(row, bits=bits) for row in made.layers)
            return self._measured(dataclasses.replace(made, layers=rows), 0.0, rounds_to_nearest)

        return kept(self.out, f"dense-{bits}{'-nearest' if rounds_to_nearest else ''}", make)

    def reference(self) -> dict[str, Any]:
        return kept(self.out, "reference", lambda: {"top1": accuracy(self.model, self.test), "share": 1.0})

    def _measured(self, made: Plan, seconds: float, rounds_to_nearest: bool = False) -> dict[str, Any]:
        started = time.monotonic()
        if rounds_to_nearest:
            plain = tuple(dataclasses.replace(row, bits=32) for row in made.layers)
            small, _ = tensorized(self.model, dataclasses.replace(made, layers=plain))
            _to_nearest_(small, made)
        else:
            small, made = tensorized(self.model, made, self.samples)
        seconds += time.monotonic() - started
        widths = [row.bits for row in made.layers if row.method is not None]
        return {
            "top1": accuracy(small, self.test),
            "share": state_bytes(small) / state_bytes(self.model),
            "seconds": seconds,
            "bits": {str(bits): widths.count(bits) for bits in sorted(set(widths))},
            "methods": sorted({row.method.name for row in made.layers if row.method is not None}),
        }


@torch.no_grad()
def _to_nearest_(small: nn.Module, made: Plan) -> None:
    bits = {row.name: row.bits for row in made.layers}
    for name, layer in tensorized_layers(small).items():
        rounded = nearest(layer.factors(), bits[name])
        for own, value in zip(layer.factor_tensors(), rounded.factors.tensors, strict=True):
            own.copy_(value)
        layer.put_on_(rounded.grids)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--network", choices=("resnet32", "lite0"), default="resnet32")
    arguments.add_argument("--data", required=True, help="CIFAR-10 with train/ and test/, or the folder of images")
    arguments.add_argument("--weights", help="the reference ResNet-32's weights")
    arguments.add_argument("--methods", default="auto,cp,svd,tk,tt,dense")
    arguments.add_argument("--sizes", default="0.25,0.16,0.11,0.08,0.06,0.04,0.03")
    arguments.add_argument("--dense", default="8,6,5,4")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/bytes")
    options = arguments.parse_args()
    torch.manual_seed(options.seed)
    bench = Bench(options)
    reference = bench.reference()["top1"]
    rows = []

    def add(name: str, size: str, found: dict[str, Any]) -> None:
        widths = ", ".join(f"{count} in {bits}" for bits, count in found["bits"].items())
        top1 = f"{found['top1']:.2f}", f"{found['top1'] - reference:+.2f}"
        rows.append([name, size, f"{found['share']:.4f}", *top1, widths, f"{found['seconds']:.0f}"])

    for bits in map(int, options.dense.split(",")):
        add(f"dense, {bits} bits, nearest", "", bench.dense(bits, rounds_to_nearest=True))
        add(f"dense, {bits} bits", "", bench.dense(bits, rounds_to_nearest=False))
    for method in options.methods.split(","):
        for size in options.sizes.split(","):
            try:
                add(f"`{method}`", size, bench.sized(method, size))
            except InfeasibleRateError as error:
                print(f"{method} at {size}: {error}", flush=True)
    print(f"\nReference: {reference:.2f} %. {machine(options.seed)}\n")
    print(table(["network", "size", "share of the bytes", "top-1 %", "gain", "layers in bits", "seconds"], rows))


if __name__ == "__main__":
    main()
