"""The decompositions against tensorly's solvers: time and error at equal ranks, in one process.

    python -m benchmarks.decompose                              # ResNet-50's shapes, kernels with a falling spectrum
    python -m benchmarks.decompose --weights resnet32.pt        # the kernels in a file of weights

All convolutions but the first, without the depthwise ones, and all dense layers, in float32, at the ranks of each
rate. tensorly runs with its defaults, its CP with at most --cp-iterations sweeps, one layer after the other on all
threads; layers of one shape count as often as they occur but only the first is decomposed. Ours is the time of all
layers, side by side on the same threads as tspc decomposes them, of `cp` and `rcp` with the fewest sweeps that come
down to 1.001 × tensorly's error in each shape; "default s" is how long the default settings take, and our error
theirs.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.common import machine, table
from tspc.decompositions import METHODS, Decomposition, Rank, Shape
from tspc.models.torchvision_zoo import torchvision_network
from tspc.models.weights import read_state
from tspc.system.parallel import side_by_side

SLACK = 1.001
"""Our error counts as equal to theirs up to this factor."""
DECAY = 0.5
"""Singular values of the synthetic kernels' unfoldings fall like i to minus this power."""
MOST_SWEEPS = 256


@dataclass(frozen=True)
class Job:
    """One kernel to decompose by one method. `count` layers share its shape."""

    method: Decomposition
    kernel: Tensor
    rank: Rank
    count: int = 1


@dataclass(frozen=True)
class Outcome:
    """All layers by one method at one rate. Seconds, and ‖K − K̂‖/‖K‖ of every shape."""

    layers: int
    theirs: float
    ours: float
    default: float
    errors_theirs: list[float]
    errors_ours: list[float]
    counts: list[int]

    def mean(self, errors: list[float]) -> float:
        return sum(e * n for e, n in zip(errors, self.counts, strict=True)) / self.layers


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


def jobs_of(method: Decomposition, rate: float, kernels: list[Tensor]) -> list[Job]:
    """Layers whose rank-1 form is over the rate are left out."""
    jobs = []
    for kernel in kernels:
        shape = tuple(kernel.shape)
        own = method.for_shape(shape)
        if own.min_params(shape) <= (budget := math.floor(rate * kernel.numel())):
            jobs.append(Job(own, kernel, own.rank_for(shape, budget)))
    return jobs


def one_of_each(jobs: list[Job]) -> list[Job]:
    first: dict[Shape, Job] = {}
    for job in jobs:
        first.setdefault(tuple(job.kernel.shape), job)
    count = lambda job: sum(j.kernel.shape == job.kernel.shape for j in jobs)  # noqa: E731
    return [replace(job, count=count(job)) for job in first.values()]


def fit(method: Decomposition, job: Job) -> tuple[float, float]:
    """Seconds and relative error."""
    _synchronise(job.kernel)
    start = time.perf_counter()
    factors = method.decompose(job.kernel, job.rank)
    _synchronise(job.kernel)
    seconds = time.perf_counter() - start
    return seconds, float((method.reconstruct(factors) - job.kernel).norm() / job.kernel.norm())


def _synchronise(kernel: Tensor) -> None:
    if kernel.is_cuda:
        torch.cuda.synchronize(kernel.device)


def seconds(jobs: list[Job]) -> float:
    """Of all of them side by side; the better of two, for a first run also warms up."""

    def once() -> float:
        start = time.perf_counter()
        list(side_by_side(lambda j: j.method.decompose(j.kernel, j.rank), jobs, size=lambda j: j.kernel.numel()))
        _synchronise(jobs[0].kernel)
        return time.perf_counter() - start

    return min(once(), once())


def swept(job: Job, sweeps: int) -> Decomposition:
    """The job's CP with exactly so many sweeps."""
    inner = {"max_iterations": sweeps, "tolerance": 0.0}
    return METHODS[job.method.name](**inner)


def fewest_sweeps(error: float, job: Job) -> int | None:
    """That come down to `error`; None if MOST_SWEEPS do not, in a worse local minimum."""
    low, high = 0, 4
    while fit(swept(job, high), job)[1] > error:
        low, high = high, 2 * high
        if high > MOST_SWEEPS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(swept(job, middle), job)[1] <= error else (middle, high)
    return high


def equally_good(jobs: list[Job], errors: dict[Shape, float]) -> list[Job]:
    """The jobs with as few sweeps of CP as meet tensorly's errors."""
    sweeps = {}
    for job in one_of_each(jobs):
        shape = tuple(job.kernel.shape)
        if job.method.name in ("cp", "rcp") and not (job.method.name == "rcp" and math.prod(shape[2:]) == 1):
            sweeps[shape] = fewest_sweeps(SLACK * errors[shape], job)
            if sweeps[shape] is None:
                print(f"{job.method.name} of {shape} at rank {job.rank}: {SLACK} × tensorly's error not met")
    return [
        replace(job, method=swept(job, found)) if (found := sweeps.get(tuple(job.kernel.shape))) else job
        for job in jobs
    ]


def outcome(name: str, rate: float, kernels: list[Tensor], iterations: int) -> Outcome:
    settings = {
        "cp": {"max_iterations": iterations, "tolerance": 1e-8},
        "tk": {"max_iterations": 100, "tolerance": 1e-4},
    }.get(name.removeprefix("r"), {})
    tensorly = METHODS[name](solver="tensorly", **settings)
    jobs = jobs_of(METHODS[name](), rate, kernels)
    each = one_of_each(jobs)
    theirs = [fit(tensorly.for_shape(tuple(job.kernel.shape)), job) for job in each]
    errors = {tuple(job.kernel.shape): error for job, (_, error) in zip(each, theirs, strict=True)}
    return Outcome(
        len(jobs),
        sum(spent * job.count for job, (spent, _) in zip(each, theirs, strict=True)),
        seconds(equally_good(jobs, errors)),
        seconds(jobs),
        list(errors.values()),
        [fit(job.method, job)[1] for job in each],
        [job.count for job in each],
    )


def row(name: str, rate: float, found: Outcome) -> list[str]:
    """One line of the table: sums of seconds, means of errors over layers."""
    worst = max(ours / theirs for ours, theirs in zip(found.errors_ours, found.errors_theirs, strict=True))
    spent = [f"{found.theirs:.2f}", f"{found.ours:.2f}", f"{found.theirs / found.ours:.1f}", f"{found.default:.2f}"]
    errors = [f"{found.mean(e):.4f}" for e in (found.errors_theirs, found.errors_ours)]
    return [f"`{name}`", f"{rate:g}", str(found.layers), *spent, *errors, f"{worst:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="decompose the kernels in this file instead of synthetic ones")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rates", default="0.4,0.1,0.05")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cp-iterations", type=int, default=20, help="most sweeps of tensorly's CP")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    kernels = stored_kernels(options.weights) if options.weights else synthetic_kernels(options.seed)
    kernels = [kernel.to(options.device) for kernel in kernels]
    warm_up = [falling_kernel((24, 16, 3, 3), torch.Generator().manual_seed(0)).to(options.device)]
    rates, names = [float(r) for r in options.rates.split(",")], options.methods.split(",")
    print(f"{len(kernels)} layers, {options.threads} threads, {options.device}. {machine(options.seed)}\n")
    head = ["method", "rate", "layers", "theirs s", "ours s", "ratio", "default s", "error theirs", "error ours"]
    print(table([*head, "max error ratio"], []))
    everything: dict[str, list[Outcome]] = {name: [] for name in names}
    for rate in rates:
        for name in names:
            outcome(name, 0.4, warm_up, options.cp_iterations)
            everything[name].append(found := outcome(name, rate, kernels, options.cp_iterations))
            print(f"| {' | '.join(row(name, rate, found))} |", flush=True)
        default = sum(outcomes[-1].default for outcomes in everything.values())
        print(f"| all | {rate:g} | | | | | {default:.2f} | | | |", flush=True)
    for name, outcomes in everything.items():
        theirs, ours = (sum(getattr(found, whose) for found in outcomes) for whose in ("theirs", "ours"))
        print(f"| `{name}` | all | | {theirs:.2f} | {ours:.2f} | {theirs / ours:.1f} | | | | |", flush=True)


if __name__ == "__main__":
    main()
