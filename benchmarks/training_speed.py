"""Steps per second of the training phases, on the ResNet-32 and CIFAR-10.

    python -m benchmarks.training_speed --data CIFAR --weights resnet32.pt --threads 1

Phase 1: a step of each block with its kept activations (their making included, spread over the steps) against one that
runs both whole networks forward, as the paper's code does; mean over the blocks. Phase 2: a step of plain finetuning
(no reference network) of the compressed network against one of the dense network, in the same loop.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import cifar_reference, machine, parser, table, tuned_block
from tspc.compression.compress import compress
from tspc.data import Data, Feed
from tspc.decompositions import METHODS
from tspc.layers.forms import tensorized_layers
from tspc.phases.context import Context
from tspc.phases.distill import Distillation, distill
from tspc.terminal.display import Display
from tspc.training import Hardware, Labelled, Progress, Recipe, fit, place
from tspc.traversal.blocks import find_blocks
from tspc.traversal.copying import copied

CPU = torch.device("cpu")
BATCH = 128


def kept_activations(model: nn.Module, reference: nn.Module, data: Data, steps: int) -> float:
    """Steps per second of phase 1, all blocks after each other."""
    settings = Distillation(
        1, BATCH, 3e-3, steps=steps, schedule="cosine", held_out=0, images=4096, least_gain=0.0, evaluations=1
    )
    counted = 0

    def note(record: dict[str, Any]) -> None:
        nonlocal counted
        counted = counted + steps if record.get("step") == steps else counted

    context = Context(data, Hardware(CPU), 0, Display(is_silent=True), note)
    started = time.perf_counter()
    distill(model, reference, settings, context, Progress())
    return counted / (time.perf_counter() - started)


def whole_networks(model: nn.Module, reference: nn.Module, data: Data, steps: int) -> float:
    """Steps per second when every step runs both networks, mean over the blocks."""
    blocks = find_blocks(reference, list(tensorized_layers(model)))
    batches = data.train_batches(Feed(BATCH, 0, CPU), 0)
    started = time.perf_counter()
    for name in blocks:
        with tuned_block(model, reference, name) as step:
            for _ in range(steps):
                step(next(batches)[0])
    return len(blocks) * steps / (time.perf_counter() - started)


def finetuning(model: nn.Module, data: Data, steps: int) -> float:
    """Steps per second of plain finetuning."""
    recipe = Recipe(1, BATCH, 0.01, steps=steps)
    batches = Labelled(data, Feed(BATCH, 0, CPU))

    def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(images), labels)

    model.train().requires_grad_(True)
    fit(model, batches, loss_of, dataclasses.replace(recipe, steps=2), Hardware(CPU), 0)
    started = time.perf_counter()
    fit(model, batches, loss_of, recipe, Hardware(CPU), 0)
    return steps / (time.perf_counter() - started)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--methods", default=",".join(METHODS))
    arguments.add_argument("--rate", type=float, default=0.1)
    arguments.add_argument("--steps", type=int, default=30)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    _, data, reference = cifar_reference(options)
    reference = place(reference, CPU).eval()
    rows = []
    for method in options.methods.split(","):
        make = lambda method=method: place(compress(reference, method, options.rate, allocation="uniform"), CPU)  # noqa: E731
        naive = whole_networks(make(), reference, data, 3)
        kept = kept_activations(make(), reference, data, options.steps)
        dense = finetuning(copied(reference), data, options.steps)
        small = finetuning(make(), data, options.steps)
        cells = [f"{value:.2f}" for value in (naive, kept, kept / naive, dense, small, small / dense)]
        rows.append([f"`{method}`", *cells])
        print(f"{method}: {cells}", flush=True)
    print(f"\nRate {options.rate:g}, batches of {BATCH}, {options.threads} threads. {machine(options.seed)}\n")
    head = ["method", "phase 1, whole networks", "kept activations", "ratio", "phase 2, dense", "compressed", "ratio"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
