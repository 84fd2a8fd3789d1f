"""Seconds for a batch: the dense network, the methods, tensorly-torch's factorized layers, in every runtime.

    pip install -e '.[benchmark,openvino]'
    python -m benchmarks.inference --rate 0.1 --methods dense,svd,cp,tk,tt --runtimes onnx,onnx-int8 --batches 1,8

Networks and factors are random, for only speed counts here: every layer has the rate asked for (`allocation=uniform`),
its ranks in multiples of `--rank-multiple` (reshaped methods: of a fourth of it). Its path is the cheapest by the cost
model of the runtime in which the network will run (`--plan-for NAME`: of this runtime). Batch norms are folded, in the
dense network too; tensorly-torch's layers (`tltorch-cp`, `-tucker`, `-tt`, with their own ranks for the same rate) keep
them. `--first` tensorizes the first convolution, too.

Runtimes: `eager`, `channels_last`, `compile` (channels last), `eager-bfloat16`, `compile-bfloat16` (channels last, in
bfloat16); `onnx` (ONNX Runtime), `onnx-int8`; `openvino`, `openvino-bfloat16`, `openvino-int8`. Ranges of 8-bit
activations are those of the random images. `--threads 1 --clock cpu` takes the processor's time rather than the wall's:
for machines on which something else runs too.

A machine's speed drifts, so every network runs in turn with dense ones: in the same library in float32 and in int8, and
in float32 in ONNX Runtime. In each of `--rounds` rounds all run once to warm the caches and a few times for the clock,
and the round gives one ratio of their medians. Printed are the median of the seconds, and of the ratios with the middle
half of them; of the dense network against itself, too, which shows how far to trust the rest.

What was measured is kept in `--out`, for each method, library and batch size, and not measured again: a long run can be
made in parts.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import kept, machine, table
from benchmarks.inference_networks import ALL, DENSE, NETWORKS, network
from benchmarks.inference_rounds import BASE, RUNTIMES, TORCH, library, ratios, runner, shown, timed
from tspc.deploy import Graphs
from tspc.deploy.calls import FLOAT32, precision
from tspc.deploy.exporting import INT8

SAME = "same"


class Networks:
    """Networks of one method, each made when it is first needed; graphs of them."""

    def __init__(self, method: str, options: argparse.Namespace, images: torch.Tensor) -> None:
        self.method, self.options, self.images = method, options, images
        self.graphs = Graphs({}, (images,))
        self.rates: dict[str, str] = {}
        self._sides: dict[str, str] = {}

    def run(self, runtime: str, batch: int) -> Callable[[], object]:
        """A call that runs a batch of so many images. Raises what the library raises."""
        side = self._side("eager" if runtime in TORCH else runtime)
        found = runner(self.graphs, side, runtime, self.images[:batch])
        how = self.graphs.int8.get(side)
        if precision(runtime) == INT8 and how is not None and how.float_layers:
            print(f"  {self.method} in {runtime}: {' and '.join(how.float_layers)} layer in float32", flush=True)
        return found

    def _side(self, runtime: str) -> str:
        """The name of the network that is planned for a runtime; equal plans are one network."""
        wanted = runtime if self.options.plan_for == SAME else self.options.plan_for
        if wanted not in self._sides:
            model, rate = network(self.method, self.options, self.images, wanted)
            name = self._sides[wanted] = str(model)  # the ranks and paths of all layers
            if name not in self.graphs.networks:
                self.graphs.networks[name], self.rates[name] = model, rate
        return self._sides[wanted]

    @property
    def rate(self) -> str:
        """The rate that was reached, or the rates."""
        return ", ".join(sorted(set(self.rates.values())))


def measured(options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """For each method, library and batch size what was found; measured now if it is not kept."""
    count = max(options.batches)
    size = NETWORKS[options.network][2]
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(options.seed))
    dense = Networks(DENSE, options, images)
    base = cache(dense.run)
    for method in options.methods:
        own = Networks(method, options, images)
        for name in dict.fromkeys(map(library, options.runtimes)):
            runtimes = [runtime for runtime in options.runtimes if library(runtime) == name]
            for batch in options.batches:

                def make(own: Networks = own, batch: int = batch, runtimes: list[str] = runtimes) -> dict[str, Any]:
                    runs = partial(own.run, batch=batch), partial(base, batch=batch)
                    found = timed(*runs, runtimes, options.rounds, options.clock == "cpu")
                    return {"rate": own.rate, **found}

                yield method, batch, kept(options.out, f"{method}-{'+'.join(runtimes)}-{batch}", make)
        del own
        gc.collect()


def tables(options: argparse.Namespace) -> str:
    """Markdown: a table for each batch size, and the fastest network at it."""
    rows: dict[int, list[list[str]]] = {batch: [] for batch in options.batches}
    best: dict[int, tuple[float, str]] = {}
    for method, batch, found in measured(options):
        for runtime in options.runtimes:
            if runtime in found["own"]:
                ratio = ratios(runtime, found["own"], found[DENSE])
                seconds = 1000 * statistics.median(found["own"][runtime])
                cells = [f"{seconds:.4g}", *(shown(ratio.get(key)) for key in (FLOAT32, INT8, BASE))]
                faster = statistics.median(ratio.get(BASE) or [0.0])
                if faster > best.get(batch, (0.0, ""))[0]:
                    int8 = shown(ratio.get(INT8))
                    beside = f", {int8} the dense network in int8 in the same runtime" if int8 else ""
                    text = f"`{method}` in {runtime}: {shown(ratio[BASE])} dense float32 in ONNX Runtime{beside}"
                    best[batch] = faster, text
            elif runtime in found["failed"]:
                cells = [found["failed"][runtime], "", "", ""]
            else:
                continue
            rows[batch].append([f"`{method}`", found["rate"], runtime, *cells])
    heads = ["", "rate", "runtime", "ms", "dense float32", "dense int8", "dense float32 in ONNX Runtime"]
    texts = []
    for batch, those in rows.items():
        order = sorted(those, key=lambda row: options.runtimes.index(row[2]))
        texts.append(f"Batches of {batch}:\n\n{table(heads, order)}")
        if batch in best:
            texts.append(f"The fastest is {best[batch][1]}.")
    return "\n\n".join(texts)


def names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Reads a list of names with commas."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        if wrong := sorted(set(found) - set(allowed)):
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(allowed)}")
        return found

    return read


def options_of() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--network", choices=NETWORKS, default="resnet50")
    arguments.add_argument("--rate", type=float, default=0.1)
    arguments.add_argument("--methods", type=names(ALL), default=list(ALL))
    arguments.add_argument("--runtimes", type=names(RUNTIMES), default=["eager", "channels_last", "onnx"])
    arguments.add_argument("--batches", help="sizes of batches, as in 1,8; by default the network's usual one")
    arguments.add_argument("--rank-multiple", type=int, default=8)
    arguments.add_argument("--objective", default="parameters")
    arguments.add_argument("--paths", default="model")
    arguments.add_argument("--plan-for", choices=(SAME, *RUNTIMES), default=SAME)
    arguments.add_argument("--first", action="store_true")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/inference")
    options = arguments.parse_args()
    if options.rounds < 2:
        arguments.error("--rounds takes at least 2: one ratio has no middle half")
    if options.clock == "cpu" and options.threads != 1:
        arguments.error("--clock cpu adds up the time of all threads: it needs --threads 1")
    options.batches = [int(n) for n in (options.batches or str(NETWORKS[options.network][1])).split(",")]
    settings = (
        *(options.network, f"{options.rate:g}", f"multiple{options.rank_multiple}", options.objective, options.paths),
        *(options.plan_for, *(["first"] * options.first), f"threads{options.threads}", f"rounds{options.rounds}"),
        *(options.clock, f"seed{options.seed}"),
    )
    options.out = Path(options.out, "-".join(settings))
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    found = tables(options)
    print(
        f"\n{options.network}, rate {options.rate:g}, images of {NETWORKS[options.network][2]}², "
        f"{options.threads} threads, rank multiple {options.rank_multiple}, objective {options.objective}. "
        f"{machine(options.seed)}\n"
    )
    print(found)


if __name__ == "__main__":
    main()
