"""What keeping freed memory is worth on a CPU (`tspc.allocator`): the same work in two processes, with and without.

    python -m benchmarks.allocation

Random weights and images, for only speed counts. A training step and a pass without gradients, seconds of the
processor (median of --repeats), each process alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tspc.allocator import keep_freed_memory
from tspc.models import cifar_resnet, torchvision_network

WORK = {"ResNet-32, 128 × 32²": (128, 32), "MobileNetV2, 32 × 224²": (32, 224)}


def network_of(name: str) -> nn.Module:
    if name.startswith("ResNet-32"):
        return cifar_resnet("resnet32", 10, 3)
    return torchvision_network("mobilenet_v2", 1000, 3, pretrained=False, kwargs={})


def measure(repeats: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, (batch, size) in WORK.items():
        torch.manual_seed(0)
        network, images = network_of(name), torch.randn(batch, 3, size, size)
        labels = torch.zeros(batch, dtype=torch.long)

        def train(network: nn.Module = network, images: torch.Tensor = images, labels: torch.Tensor = labels) -> None:
            network.train().zero_grad()
            F.cross_entropy(network(images), labels).backward()

        @torch.no_grad()
        def infer(network: nn.Module = network, images: torch.Tensor = images) -> None:
            network.eval()(images)

        found[name] = {"training step": seconds(train, repeats), "inference": seconds(infer, repeats)}
    return found


def seconds(work: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--one", choices=("given", "kept"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        if options.one == "kept":
            keep_freed_memory()
        print(json.dumps(measure(options.repeats)))
        return
    from benchmarks.common import machine, table

    command = [sys.executable, "-m", "benchmarks.allocation", "--threads", str(options.threads)]
    command += ["--repeats", str(options.repeats), "--one"]
    given, kept = (
        json.loads(subprocess.run([*command, which], check=True, stdout=subprocess.PIPE).stdout)
        for which in ("given", "kept")
    )
    rows = [
        [name, work, f"{before:.3f}", f"{kept[name][work]:.3f}", f"{before / kept[name][work]:.2f}"]
        for name, works in given.items()
        for work, before in works.items()
    ]
    print(f"{options.threads} threads. {machine(0)}\n")
    print(table(["network", "work", "as it comes, s", "kept, s", "ratio"], rows))


if __name__ == "__main__":
    main()
