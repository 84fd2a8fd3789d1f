"""Fits the constants of `tspc.compression.runtime_costs` to the times of small convolutional networks.

    python -m benchmarks.fit_costs --runtimes onnx,onnx-int8,openvino,openvino-int8 --threads 1

A block of one to three convolutions is repeated MANY times and once. The difference of their times is the time of
MANY − 1 blocks: what stands around a network, such as the conversion to 8 bits, falls out. The time of a block is
fitted, by least squares of the relative errors, as a sum of what its convolutions do: multiply-adds with channels in
multiples of some number, entries read or written, weights read, and calls. Printed are the constants in multiply-adds,
and how far the fit is from the times. The times are kept in `--out`, and not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from benchmarks.common import kept, machine, table
from benchmarks.inference_rounds import OTHERS
from tspc.deploy import Graphs
from tspc.deploy.calls import Unusable, call

MANY = 4
RUNS = 6
MULTIPLES = (1, 4, 8, 16, 32)
Conv = tuple[int, int, int]
"""Output channels, input channels, window."""
PLACES = ((64, 56), (256, 28), (512, 28), (1024, 14), (2048, 7), (32, 32))
"""Channels and the side of the map."""
RANKS = (8, 16, 48)


def blocks() -> Iterator[tuple[int, tuple[Conv, ...]]]:
    """The side of a map, and convolutions that keep the number of channels."""
    for channels, side in PLACES:
        for rank in (r for r in RANKS if r <= channels):
            yield side, ((rank, channels, 1), (channels, rank, 1))
        if channels <= 512:
            yield side, ((channels, channels, 1),)
    yield from ((side, ((c, c, 3),)) for c, side in ((16, 56), (48, 28), (64, 56), (128, 28), (256, 14), (512, 7)))


def network(convs: Sequence[Conv], repeats: int) -> nn.Sequential:
    torch.manual_seed(0)
    made = [nn.Conv2d(s, t, k, padding=k // 2) for _ in range(repeats) for t, s, k in convs]
    return nn.Sequential(*made).eval()


def seconds_of_block(
    convs: Sequence[Conv], side: int, runtimes: Sequence[str], batches: Sequence[int]
) -> dict[str, dict[str, float]]:
    """The least seconds of one block by runtime and batch size."""
    images = torch.randn(max(batches), convs[0][1], side, side)
    graphs = Graphs({str(n): network(convs, n) for n in (1, MANY)}, (images,))
    runs = {}
    for runtime, batch, n in itertools.product(runtimes, batches, (1, MANY)):
        try:
            runs[runtime, batch, n] = call(graphs, str(n), runtime, (images[:batch],))
        except Unusable as error:
            print(f"  {runtime}: {error}", flush=True)
    least = dict.fromkeys(runs, float("inf"))
    # Of one thread the processor's time, which other work of the machine changes less.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(RUNS):
        for key, run in runs.items():
            run()
            begun = clock()
            run()
            least[key] = min(least[key], clock() - begun)
    return {
        runtime: {
            str(batch): (least[runtime, batch, MANY] - least[runtime, batch, 1]) / (MANY - 1)
            for batch in batches
            if (runtime, batch, MANY) in least
        }
        for runtime in runtimes
    }


def features(convs: Sequence[Conv], side: int, batch: int, inputs: int, outputs: int) -> list[float]:
    """Multiply-adds, entries of activations read or written, weights, calls."""
    found = np.zeros(4)
    for t, s, k in convs:
        padded = -(-t // outputs) * outputs * -(-s // inputs) * inputs
        found += [batch * side**2 * padded * k**2, batch * side**2 * (s + t), t * s * k**2, 1]
    return found.tolist()


def fitted(points: Sequence[tuple[Sequence[Conv], int, int, float]]) -> list[str]:
    """A row of the table from (convolutions, side, batch, seconds) of each block."""
    best: tuple[float, list[str]] | None = None
    seconds = np.array([point[3] for point in points])
    for inputs, outputs in itertools.product(MULTIPLES, repeat=2):
        rows = np.array([features(*point[:3], inputs, outputs) for point in points]) / seconds[:, None]
        found, _ = nnls(rows, np.ones(len(rows)))
        errors = np.abs(rows @ found - 1)
        if best is None or errors.mean() < best[0]:
            mac, *rest = found
            units = [f"{value / mac:.3g}" if mac > 0 else "∞" for value in rest]
            shown = [str(inputs), str(outputs), f"{1e-9 / mac:.3g}" if mac > 0 else "∞", *units]
            best = float(errors.mean()), [*shown, f"{100 * errors.mean():.0f} %", f"{100 * np.median(errors):.0f} %"]
    assert best is not None
    return best[1]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runtimes", default=",".join(OTHERS))
    arguments.add_argument("--batches", default="1,8")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", default="outputs/fit_costs")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    runtimes, batches = options.runtimes.split(","), [int(n) for n in options.batches.split(",")]
    points: dict[str, list[tuple[Sequence[Conv], int, int, float]]] = {runtime: [] for runtime in runtimes}
    folder = Path(options.out, f"{'+'.join(runtimes)}-{options.batches}-threads{options.threads}")
    for side, convs in blocks():
        name = "-".join("x".join(map(str, shape)) for shape in ((side,), *convs))
        found = kept(folder, name, partial(seconds_of_block, convs, side, runtimes, batches))
        for runtime, batch in itertools.product(runtimes, batches):
            seconds = found[runtime].get(str(batch), 0.0)
            if seconds > 0:  # a difference of noisy times may be negative
                points[runtime].append((convs, side, batch, seconds))
    heads = ("runtime", "inputs", "outputs", "10⁹ macs/s", "entry", "weight", "call", "mean error", "median")
    print(f"\n{machine(0)}\n\n{table(list(heads), [[r, *fitted(p)] for r, p in points.items() if p])}")


if __name__ == "__main__":
    main()
