"""The decompositions against tensorly's solvers: time and error at equal ranks, in one process.

    python -m benchmarks.decompose                              # ResNet-50's shapes, kernels with a falling spectrum
    python -m benchmarks.decompose --weights resnet32.pt        # the kernels in a file of weights

All convolutions but the first, without the depthwise ones, and all dense layers, in float32, at the ranks of each
rate. tensorly runs with its defaults, its CP with at most --cp-iterations sweeps. Our time of `cp` and `rcp` is of
the fewest sweeps that come down to 1.001 × tensorly's error, our error that of the default settings; "default s" is
how long those take. Layers of one shape count as often as they occur but only the first is decomposed, unless
--full is given.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import machine, table
from tspc.decompositions import METHODS, Decomposition, Rank, Shape
from tspc.errors import DecompositionError
from tspc.models.torchvision_zoo import torchvision_network
from tspc.models.weights import read_state

SLACK = 1.001
"""Our error counts as equal to theirs up to this factor."""
DECAY = 0.5
"""Singular values of the synthetic kernels' unfoldings fall like i to minus this power."""
MOST_SWEEPS = 256


@dataclass(frozen=True)
class Timing:
    """One kernel at one rank; `count` layers share it. Errors are ‖K − K̂‖/‖K‖."""

    count: int
    theirs: float
    ours: float
    default: float
    error_theirs: float
    error_ours: float


def falling_kernel(shape: Shape, generator: torch.Generator) -> Tensor:
    """A Gaussian kernel whose modes were weighted i^-DECAY along random axes."""
    kernel = torch.randn(shape, generator=generator)
    for mode, n in enumerate(shape):
        axes = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
        weighted = axes * torch.arange(1, n + 1) ** -DECAY
        kernel = torch.tensordot(weighted, kernel.movedim(mode, 0), dims=1).movedim(0, mode)
    return kernel.contiguous()


def synthetic_kernels(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    network = torchvision_network("resnet50", 1000, 3, pretrained=False, kwargs={})
    modules = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)][1:]
    return [falling_kernel(tuple(m.weight.shape), generator) for m in modules]


def stored_kernels(path: str) -> list[Tensor]:
    kernels = [t.float() for key, t in read_state(path).items() if key.endswith("weight") and t.ndim in (2, 4)]
    return [k.contiguous() for k in kernels[1:] if k.shape[1] > 1]


def grouped(kernels: list[Tensor], full: bool) -> list[tuple[Tensor, int]]:
    """Kernels and how many layers each stands for."""
    if full:
        return [(kernel, 1) for kernel in kernels]
    first: dict[Shape, Tensor] = {}
    for kernel in kernels:
        first.setdefault(tuple(kernel.shape), kernel)
    return [(kernel, sum(k.shape == kernel.shape for k in kernels)) for kernel in first.values()]


def fit(method: Decomposition, kernel: Tensor, rank: Rank) -> tuple[float, float]:
    """Seconds and relative error."""
    method = method.for_shape(tuple(kernel.shape))
    _synchronise(kernel)
    start = time.perf_counter()
    factors = method.decompose(kernel, rank)
    _synchronise(kernel)
    seconds = time.perf_counter() - start
    return seconds, float((method.reconstruct(factors) - kernel).norm() / kernel.norm())


def _synchronise(kernel: Tensor) -> None:
    if kernel.is_cuda:
        torch.cuda.synchronize(kernel.device)


def seconds_to(error: float, name: str, kernel: Tensor, rank: Rank) -> float:
    """Time of the fewest sweeps that reach `error`; infinite if MOST_SWEEPS do not, in a worse local minimum."""

    def swept(count: int) -> tuple[float, float]:
        return fit(METHODS[name](max_iterations=count, tolerance=0.0), kernel, rank)

    low, high = 0, 8
    while (found := swept(high))[1] > error:
        low, high = high, 2 * high
        if high > MOST_SWEEPS:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        tried = swept(middle)
        if tried[1] <= error:
            high, found = middle, tried
        else:
            low = middle
    return found[0]


def timings(name: str, rate: float, kernels: list[tuple[Tensor, int]], sweeps: int) -> Iterator[Timing]:
    settings = {
        "cp": {"max_iterations": sweeps, "tolerance": 1e-8},
        "tk": {"max_iterations": 100, "tolerance": 1e-4},
    }.get(name.removeprefix("r"), {})
    native, tensorly = METHODS[name](), METHODS[name](solver="tensorly", **settings)
    for kernel, count in kernels:
        shape = tuple(kernel.shape)
        method = native.for_shape(shape)
        try:
            rank = method.rank_for(shape, math.floor(rate * kernel.numel()))
        except DecompositionError:
            continue
        theirs, error_theirs = fit(tensorly, kernel, rank)
        default, error_ours = fit(native, kernel, rank)
        alternates = method.name in ("cp", "rcp") and not (method.name == "rcp" and math.prod(shape[2:]) == 1)
        ours = seconds_to(SLACK * error_theirs, name, kernel, rank) if alternates else default
        yield Timing(count, theirs, ours, default, error_theirs, error_ours)


def row(name: str, rate: float, found: list[Timing]) -> list[str]:
    """One line of the table: sums of seconds, means of errors, over layers."""
    layers = sum(t.count for t in found)
    theirs, ours, default = (sum(getattr(t, key) * t.count for t in found) for key in ("theirs", "ours", "default"))
    errors = [sum(getattr(t, key) * t.count for t in found) / layers for key in ("error_theirs", "error_ours")]
    worst = max(t.error_ours / t.error_theirs for t in found)
    numbers = [f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.1f}", f"{default:.2f}"]
    return [f"`{name}`", f"{rate:g}", str(layers), *numbers, *(f"{e:.4f}" for e in errors), f"{worst:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="decompose the kernels in this file instead of synthetic ones")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rates", default="0.4,0.1,0.05")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cp-iterations", type=int, default=20, help="most sweeps of tensorly's CP")
    parser.add_argument("--full", action="store_true", help="decompose every layer, also those of equal shapes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    kernels = stored_kernels(options.weights) if options.weights else synthetic_kernels(options.seed)
    layers = [(kernel.to(options.device), count) for kernel, count in grouped(kernels, options.full)]
    warm_up = [(falling_kernel((24, 16, 3, 3), torch.Generator().manual_seed(0)).to(options.device), 1)]
    rates, names = [float(r) for r in options.rates.split(",")], options.methods.split(",")
    print(f"{len(kernels)} layers, {options.threads} threads, {options.device}. {machine(options.seed)}\n")
    head = ["method", "rate", "layers", "theirs s", "ours s", "ratio", "default s", "error theirs", "error ours"]
    print(table([*head, "max error ratio"], []))
    for rate in rates:
        total = 0.0
        for name in names:
            list(timings(name, 0.4, warm_up, options.cp_iterations))
            found = list(timings(name, rate, layers, options.cp_iterations))
            total += sum(t.default * t.count for t in found)
            print(f"| {' | '.join(row(name, rate, found))} |", flush=True)
        print(f"| all | {rate:g} | | | | | {total:.2f} | | | |", flush=True)


if __name__ == "__main__":
    main()
