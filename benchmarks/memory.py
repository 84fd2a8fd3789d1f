"""Peak memory of phase 0 with calibration: a ResNet-50 at 224×224, plan and decomposition.

    python -m benchmarks.memory --samples 64

Random weights and images, for the sizes are all that matters here. Prints the largest resident set of the process, from
the operating system, before and after.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torchvision.models import resnet50

from benchmarks.common import machine
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import tensorized
from tspc.compression.planning import plan


def peak() -> float:
    """Gigabytes (Linux counts in kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--samples", type=int, default=64)
    arguments.add_argument("--method", default="tk")
    arguments.add_argument("--rate", type=float, default=0.1)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    torch.manual_seed(options.seed)
    model = resnet50().eval()
    images = (torch.randn(32, 3, 224, 224) for _ in range(options.samples // 32))
    started, before = time.monotonic(), peak()
    with Samples(images, Calibration(samples=options.samples)) as samples:
        made = plan(model, options.method, options.rate, calibration=samples)
        planned = time.monotonic() - started
        _, done = tensorized(model, made, samples)
    seconds = time.monotonic() - started
    print(f"ResNet-50 at 224×224, {options.method} at {options.rate}, {options.samples} images: ", end="")
    print(f"{before:.2f} GB before, {peak():.2f} GB at most; {seconds:.0f} s, of which {planned:.0f} s for the plan;")
    print(f"{len(done.tensorized)} layers, rate reached {done.rate_reached:.4f}. {machine(options.seed)}")


if __name__ == "__main__":
    main()
