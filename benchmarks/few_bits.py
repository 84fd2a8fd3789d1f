"""Training of factors in few bits: straight-through, or as numbers that are rounded again. ResNet-32, CIFAR-10 (JPEG).

    python -m benchmarks.few_bits --data CIFAR --weights resnet32.pt [--sizes 0.06,0.03]

Both ways take the same steps from the same start, in phase 1 (40 steps a block) and in phase 2 (200 steps, from the
better result of phase 1). Phase 1 takes the second way, phase 2 the first one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.common import calibration_images, cifar_config, cifar_reference, machine, parser, table
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.compress import compress
from tspc.compression.integers import on_grids, state_bytes
from tspc.compression.rounding import put_on_grids_, take_off_grids_
from tspc.phases.context import Context
from tspc.phases.distill import distill
from tspc.phases.finetune import finetune
from tspc.terminal.display import Display
from tspc.training import Hardware, Progress, evaluate
from tspc.traversal.copying import copied


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        steps = [f"phase.distill.steps={options.block_steps}", f"phase.finetune.steps={options.steps}"]
        self.phases = cifar_config(options, "phase=[decompose,distill,finetune]", "method=auto", *steps).phases
        _, data, self.reference = cifar_reference(options)
        precision = torch.bfloat16 if options.precision == "bfloat16" else None
        self.context = Context(data, Hardware(torch.device("cpu"), precision), options.seed, Display())
        self.images = calibration_images(data, 512, 512, torch.device("cpu"))
        self.context.place(self.reference).eval()

    def compressed(self, size: str) -> nn.Module:
        small = compress(self.reference, "auto", size=size, calibration=self.images)
        return self.context.place(small)

    def straight_through(self, start: nn.Module) -> nn.Module:
        """Phase 1 with factors that stay on their grids."""
        with patch("tspc.phases.distill.take_off_grids_", lambda *given: {}):
            return self.rounded(start)

    def rounded(self, start: nn.Module) -> nn.Module:
        """Phase 1 as it is."""
        small = copied(start)
        distill(small, self.reference, self.phases["distill"], self.context, Progress())
        return small

    def finetuned(self, start: nn.Module) -> nn.Module:
        """Phase 2 as it is."""
        small = copied(start)
        finetune(small, self.reference, self.phases["finetune"], self.context, Progress(), "finetune")
        return small

    def finetuned_as_numbers(self, start: nn.Module) -> nn.Module:
        """Phase 2 with numbers that are rounded at its end."""
        small = copied(start)
        widths = take_off_grids_(small)
        finetune(small, self.reference, self.phases["finetune"], self.context, Progress(), "finetune")
        with Samples(self.images, Calibration(samples=len(self.images))) as samples:
            put_on_grids_(small, self.reference, widths, samples)
        return small

    def top1(self, model: nn.Module) -> float:
        assert on_grids(model)
        assert self.context.data is not None
        return 100 * evaluate(model.eval(), self.context.data, self.context.device).top1


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", default="0.06,0.03")
    arguments.add_argument("--block-steps", type=int, default=40)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = arguments.parse_args()
    bench = Bench(options)
    rows: list[list[str]] = []
    for size in options.sizes.split(","):
        start = bench.compressed(size)
        share = state_bytes(start) / state_bytes(bench.reference)
        cells = [size, f"{share:.4f}", f"{bench.top1(start):.2f}"]

        def told(way: Callable[[nn.Module], nn.Module], given: nn.Module, cells: list[str] = cells) -> nn.Module:
            began = time.monotonic()
            found = way(given)
            cells.append(f"{bench.top1(found):.2f} ({time.monotonic() - began:.0f} s)")
            print(*cells, sep=" | ", flush=True)
            return found

        told(bench.straight_through, start)
        start = told(bench.rounded, start)
        told(bench.finetuned, start)
        told(bench.finetuned_as_numbers, start)
        rows.append(cells)
    print(f"\nTop-1 % of 10,000 test images; {options.precision}. {machine(options.seed)}\n")
    heads = ["size", "share of the bytes", "decompose", "distill, straight-through", "distill, rounded again"]
    print(table([*heads, "then finetune, straight-through", "then finetune, rounded again"], rows))


if __name__ == "__main__":
    main()
