"""How small `max_drop` makes ResNet-32, how often the limit is kept on the test split, and what the search costs.

    python -m benchmarks.max_drop --data CIFAR --weights resnet32.pt

No training. Each repetition draws other calibration images and other held-out images, from the training images, or with
`--held-out fresh` from one half of the test split; then the other half tells the true drop. The smallest size in
hindsight is the smallest one of a grid whose network of the first repetition keeps the limit on the test images. The
drops of the grid's networks are interpolated. Every network is kept in --out, and not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import cifar_reference, kept, machine, parser, table
from tspc.calibration import Calibration
from tspc.calibration.samples import Samples
from tspc.compression.apply import tensorized
from tspc.compression.compress import at_share, limit_of
from tspc.compression.curves import error_curves
from tspc.compression.limits import MOST, PILOT
from tspc.compression.outline import outline
from tspc.compression.planning import planned
from tspc.compression.settings import PlanSettings
from tspc.compression.smallest import Search
from tspc.training import place
from tspc.training.held_out import HeldOut
from tspc.training.metrics import TOP1

CPU = torch.device("cpu")
CALIBRATION, BATCH = 512, 250
GRID = (0.16, 0.14, 0.125, 0.11, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.045, 0.04, 0.035, 0.03)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        _, self.data, self.model = cifar_reference(options)
        place(self.model, CPU).eval()
        self.images = _split(self.data.held_out_batches(self.data.train_size, BATCH, CPU))
        self.test = _split(self.data.test_batches(BATCH, CPU))
        if options.held_out == "fresh":
            order = torch.randperm(len(self.test[1]), generator=torch.Generator().manual_seed(options.seed))
            fresh, judges = order.chunk(2)
            self.fresh, self.test = _picked(self.test, fresh), _picked(self.test, judges)
        self.right = _right(self.model, self.test).int()

    def repetition(self, number: int) -> dict[str, Any]:
        """All limits, with the calibration and held-out images of one repetition."""

        def make() -> dict[str, Any]:
            order = torch.randperm(len(self.images[1]), generator=torch.Generator().manual_seed(number))
            with Samples(self.images[0][order[:CALIBRATION]], Calibration(samples=CALIBRATION)) as samples:
                asked = PlanSettings.of(self.options.method, max_drop=1.0)
                sketch, started = outline(self.model, asked), time.process_time()
                curves = error_curves(self.model, sketch.layers, asked.method, samples, widths=asked.widths)
                curve_seconds = time.process_time() - started
                plan_at = lambda share: planned(self.model, at_share(sketch, share), curves, None)  # noqa: E731
                started = time.process_time()
                tensorized(self.model, plan_at(0.1), samples)
                phase_zero = curve_seconds + time.process_time() - started
                inputs, labels = self._held_out(order[CALIBRATION:], number)
                started = time.process_time()
                judge = HeldOut(self.model, TOP1, lambda a, b: _batches(inputs[a:b], labels[a:b]), len(inputs), CPU)
                judge.drop(self.model, 0, min(PILOT + MOST, len(inputs)))  # the limits share the reference's scores
                common, found = curve_seconds + (time.process_time() - started) / 2, {}
                for limit in map(float, self.options.limits.split(",")):
                    settings = PlanSettings.of(asked, max_drop=limit, confidence=self.options.confidence)
                    started = time.process_time()
                    make = lambda plan: tensorized(self.model, plan, samples)  # noqa: E731
                    search = Search(plan_at, make, judge, limit_of(settings, sketch), sketch.smallest_rate, print)
                    one = search.run()
                    seconds = common + time.process_time() - started
                    assert one.drop is not None
                    found[f"{limit:g}"] = {
                        "share": one.plan.network_bytes / one.plan.network_dense_bytes,
                        "drop": one.drop.value,
                        "bound": one.drop.bound(1 - self.options.confidence),
                        "images": one.drop.count,
                        "networks": len(search.tried),
                        "test": self._drop(one.network),
                        "seconds": seconds,
                        "phases": seconds / phase_zero,
                    }
                    print(number, limit, found[f"{limit:g}"], flush=True)
            return found

        return kept(self.out, f"{self.options.method}-{self.options.held_out}-{number}", make)

    def _held_out(self, order: Tensor, number: int) -> tuple[Tensor, Tensor]:
        if self.options.held_out == "training":
            return _picked(self.images, order)
        return _picked(self.fresh, torch.randperm(len(self.fresh[1]), generator=torch.Generator().manual_seed(number)))

    def _drop(self, network: nn.Module) -> float:
        """Points that the network loses on the test images."""
        return 100 * float((self.right - _right(network, self.test).int()).double().mean())

    def hindsight(self) -> dict[str, float]:
        """Share of the bytes → drop on the test images."""

        def make() -> dict[str, Any]:
            order = torch.randperm(len(self.images[1]), generator=torch.Generator().manual_seed(0))
            found = {}
            with Samples(self.images[0][order[:CALIBRATION]], Calibration(samples=CALIBRATION)) as samples:
                asked = PlanSettings.of(self.options.method, max_drop=1.0)
                sketch = outline(self.model, asked)
                curves = error_curves(self.model, sketch.layers, asked.method, samples, widths=asked.widths)
                for share in GRID:
                    plan = planned(self.model, at_share(sketch, share), curves, None)
                    small, plan = tensorized(self.model, plan, samples)
                    found[f"{plan.network_bytes / plan.network_dense_bytes:.5f}"] = self._drop(small)
                    print(share, found, flush=True)
            return found

        return kept(self.out, f"{self.options.method}-{self.options.held_out}-hindsight", make)


def smallest_share(grid: dict[str, float], limit: float) -> float:
    """The share at which the drop, interpolated between the sizes and never falling, reaches the limit."""
    shares = sorted(map(float, grid), reverse=True)
    drops = [max(grid[f"{share:.5f}"] for share in shares[: place + 1]) for place in range(len(shares))]
    for (a, low), (b, high) in pairwise(zip(shares, drops, strict=True)):
        if low <= limit < high:
            return math.exp(math.log(a) + (limit - low) / (high - low) * (math.log(b) - math.log(a)))
    return shares[-1]


@torch.no_grad()
def _right(network: nn.Module, split: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([network.eval()(images).argmax(1) == labels for images, labels in _batches(*split)])


def _batches(images: Tensor, labels: Tensor) -> Any:
    for part, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        yield part.contiguous(memory_format=torch.channels_last), wanted


def _picked(split: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    return split[0][places], split[1][places]


def _split(batches: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(out="outputs/max_drop")
    arguments.add_argument("--method", default="auto")
    arguments.add_argument("--limits", default="0.5,1,2,5")
    arguments.add_argument("--confidence", type=float, default=0.95)
    arguments.add_argument("--repetitions", default="0-19", help="the first and the last")
    arguments.add_argument("--held-out", choices=("training", "fresh"), default="training")
    options = arguments.parse_args()
    bench = Bench(options)
    first, last = map(int, options.repetitions.split("-"))
    found = [bench.repetition(number) for number in range(first, last + 1)]
    grid, rows = bench.hindsight(), []
    for limit in options.limits.split(","):
        runs = [one[limit] for one in found]
        best = smallest_share(grid, float(limit))
        mean = lambda key: sum(run[key] for run in runs) / len(runs)  # noqa: B023, E731
        above = sum(run["test"] > float(limit) for run in runs)
        shares = sorted(run["share"] for run in runs)
        rows.append(
            [
                *(limit, f"{above} of {len(runs)}", f"{mean('test'):.2f}", f"{max(run['test'] for run in runs):.2f}"),
                *(f"{mean('bound'):.2f}", f"{mean('images'):,.0f}"),
                f"{mean('share'):.4f} ({shares[0]:.4f} to {shares[-1]:.4f})",
                *(f"{best:.4f}", f"{mean('share') / best:.2f}", f"{mean('networks'):.1f}", f"{mean('phases'):.1f}×"),
            ]
        )
    print(f"\n{machine(options.seed)} Confidence {options.confidence}; held out: {options.held_out} images.\n")
    head = ["max_drop", "above it on the test images", "mean test drop", "largest", "mean bound", "images"]
    head += ["share of the bytes", "smallest in hindsight", "ratio", "networks", "seconds, of one phase 0"]
    print(table(head, rows))
    (bench.out / f"table-{options.held_out}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
