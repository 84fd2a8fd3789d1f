"""Accuracy in a given time: tspc's three phases against the procedure of arXiv:1805.10352's code, on CIFAR-10.

    python -m benchmarks.distill --data CIFAR --weights resnet32.pt --threads 1

Each cell gives all of them the same seconds, in one process, from the same reference network. The original's way: every
layer decomposed by the least error of its kernel at the same rate; then block after block, all for equally long, tuned
by Adam at 1e-3 on the mean squared error of its activations, both whole networks run forward for every step, batch
norms in inference mode. It is run twice: with its blocks alone, for all of the time, and with half of it for finetuning
the whole network with cross-entropy after them (SGD, 0.01, momentum 0.9, weight decay 5e-4, cosine). tspc: its
defaults, the steps of the phases cut to the time; --batch, --learning-rate (of finetuning) and --distill-steps (of
phase 1 for each block; 0 leaves it out) are tspc's alone. Seconds are those of the work; looking at the test images is
not counted. "Times sooner" is when the opponent was at its best ÷ when tspc was as good, both by the looks on the way,
of --limit test images; accuracies at the end are of all. Every cell is kept in --out, and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import cifar_reference, machine, parser, table, tuned_block
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import tensorized
from tspc.compression.curves import error_curves
from tspc.compression.outline import outline
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.data import Data, Feed
from tspc.decompositions import METHODS, resolve
from tspc.layers.forms import tensorized_layers
from tspc.phases.context import Context
from tspc.phases.distill import distill
from tspc.phases.finetune import finetune
from tspc.run.config import Config
from tspc.store.files import write_json
from tspc.terminal.display import Display
from tspc.training import Hardware, Progress, evaluate, place
from tspc.traversal.blocks import find_blocks
from tspc.traversal.copying import copied

BATCH = 128
DISTILL_IMAGES = 2048
LOOKS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of finetuning after which the test images are looked at."""
CPU = torch.device("cpu")
RUNS = {"blocks": "the paper's blocks", "finetuned": "the paper's blocks, then finetuning", "ours": "tspc"}
"""What each cell runs, and how its curve is called."""


class Clock:
    """Seconds of work, and the accuracies seen on the way (of `limit` test images, which costs no time here).

    `accuracy` is that of all test images, at the end.
    """

    def __init__(self, data: Data, device: torch.device, budget: float, limit: int) -> None:
        self._data, self._device, self._limit, self.budget = data, device, limit, budget
        self._started, self._paused = time.monotonic(), 0.0
        self.points: list[tuple[str, float, float]] = []
        self.accuracy = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started - self._paused

    @property
    def left(self) -> float:
        return self.budget - self.seconds

    def look(self, label: str, model: nn.Module, is_last: bool = False) -> None:
        at, began = self.seconds, time.monotonic()
        self.points.append((label, round(at, 1), self._top1(model, self._limit)))
        if is_last:
            self.accuracy = self._top1(model, None)
        self._paused += time.monotonic() - began

    def _top1(self, model: nn.Module, limit: int | None) -> float:
        return 100 * evaluate(model, self._data, self._device, limit=limit).top1


def batches(data: Data, device: torch.device, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    feed = Feed(BATCH, seed, device)
    endless = (batch for epoch in range(10**9) for batch in data.train_batches(feed, epoch))
    return lambda: next(endless)


def original(
    reference: nn.Module, method: str, rate: float, data: Data, clock: Clock, options: Any, share: float
) -> int:
    """The procedure of the paper's code, its blocks for a share of the time; returns their optimizer steps."""
    model, _ = tensorized(reference, plan(reference, method, rate, allocation="uniform"), None)
    place(model, options.device)
    clock.look("decompose", model)
    read = batches(data, options.device, options.seed)
    blocks = find_blocks(reference, list(tensorized_layers(model)))
    steps, end = 0, clock.budget * share
    for number, name in enumerate(blocks):
        until = clock.seconds + (end - clock.seconds) / (len(blocks) - number)
        with tuned_block(model, reference, name) as step:
            while clock.seconds < until:
                step(read()[0])
                steps += 1
        if number % 5 == 4:
            clock.look("distill", model)
    if share < 1:
        _classify(model, read, clock)
    clock.look("distill" if share == 1 else "finetune", model, is_last=True)
    return steps


def _classify(model: nn.Module, read: Callable[[], tuple[Tensor, Tensor]], clock: Clock) -> None:
    """Cross-entropy for the time that is left."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    whole, looks = clock.left, 1
    while (done := 1 - clock.left / whole) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())
        images, labels = read()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if done > looks / 4:
            clock.look("finetune", model)
            looks += 1


def ours(reference: nn.Module, method: str, rate: float, config: Config, data: Data, clock: Clock, options: Any) -> int:
    """tspc's phases; returns the number of optimizer steps in phase 2."""
    distillation, finetuning = config.phases["distill"], config.phases["finetune"]
    settings = Calibration()
    images = data.calibration_batches(settings.samples, settings.batch_size, options.device)
    with Samples(images, settings, options.device) as samples:
        chosen = outline(reference, PlanSettings.of(method)).chosen
        curves = error_curves(reference, chosen, resolve(method), samples)
        model, _ = tensorized(reference, plan(reference, method, rate, curves=curves), samples)
    place(model, options.device)
    clock.look("decompose", model)
    context = Context(data, Hardware(options.device), options.seed, Display(is_silent=True))
    if options.distill_steps:
        short = dataclasses.replace(distillation, steps=options.distill_steps, images=DISTILL_IMAGES)
        distill(model, reference, short, context, Progress())
        clock.look("distill", model)
    recipe = dataclasses.replace(finetuning, batch_size=options.batch, learning_rate=options.learning_rate, held_out=0)

    def trial(steps: int) -> float:
        before = clock.seconds
        short = dataclasses.replace(recipe, steps=steps)
        finetune(copied(model), reference, short, context, Progress(), "finetune")
        return clock.seconds - before

    few, more = trial(2), trial(8)
    each = (more - few) / 6  # without what comes before the first step
    # Judging a held-out image costs about a quarter of training on one.
    judging = (finetuning.evaluations + 1) * finetuning.held_out / options.batch * each / 4
    recipe = dataclasses.replace(recipe, steps=max(10, int((clock.left - judging) / each)), held_out=1000)
    seen = _looking(clock, model, recipe.steps or 0, context)
    finetune(model, reference, recipe, seen, Progress(), "finetune")
    clock.look("finetune", model, is_last=True)
    return recipe.steps or 0


def _looking(clock: Clock, model: nn.Module, steps: int, context: Context) -> Context:
    """A context whose notes, about fifty in a phase, are used to look at the test images now and then."""
    marks = [int(steps * share) for share in LOOKS]

    def note(record: dict[str, Any]) -> None:
        if marks and record.get("step", 0) >= marks[0]:
            marks.pop(0)
            clock.look("finetune", model)

    return dataclasses.replace(context, note=note)


SETTINGS = ("seconds", "batch", "learning_rate", "distill_steps", "limit", "threads", "seed")
"""Options that a cell depends on."""


def cell(method: str, rate: float, config: Config, data: Data, reference: nn.Module, options: Any) -> dict[str, Any]:
    path = Path(options.out) / f"{method}-{rate}.json"
    settings = {name: getattr(options, name) for name in SETTINGS} | {"device": str(options.device)}
    if not path.exists():
        found: dict[str, Any] = {"method": method, "rate": rate, "settings": settings}
        for name in options.runs.split(","):
            clock = Clock(data, options.device, options.seconds, options.limit)
            if name == "ours":
                steps = ours(reference, method, rate, config, data, clock, options)
            else:
                share = 1.0 if name == "blocks" else 0.5
                steps = original(reference, method, rate, data, clock, options, share)
            found[name] = {"points": clock.points, "accuracy": clock.accuracy, "steps": steps}
            print(f"{method} {rate:g} {name}: {clock.points}, {clock.accuracy:.2f} % at the end", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    kept = json.loads(path.read_text())
    if kept.get("settings") != settings:
        raise SystemExit(f"{path} was made with other settings ({kept.get('settings')}); give another --out")
    return kept


def row(found: dict[str, Any]) -> list[str]:
    own = found["ours"]
    cells = [f"`{found['method']}`", f"{found['rate']:g}"]
    for name in ("blocks", "finetuned"):
        if name not in found:
            cells += [""] * 3
            continue
        theirs = found[name]
        at_best, best = max(((at, top1) for _, at, top1 in theirs["points"]), key=lambda point: point[1])
        reached = next((at for _, at, top1 in own["points"] if top1 >= best), None)
        sooner = "not reached" if reached is None else f"{at_best / reached:.1f}"
        cells += [f"{theirs['accuracy']:.2f}", f"{own['accuracy'] - theirs['accuracy']:+.1f}", sooner]
    phases = [f"{top1:.1f}" for name, _, top1 in own["points"] if name in ("decompose", "distill")]
    seconds = [f"{own['points'][i][1]:.0f}" for i in (0, -1)]
    return [*cells, " → ".join([*phases, f"{own['accuracy']:.2f}"]), *seconds]


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against minutes, one panel a cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(cells), 3), layout="constrained")
    for found, axes in zip(cells, figure.subplots(1, len(cells), squeeze=False, sharey=True)[0], strict=True):
        for name, label in RUNS.items():
            points = found.get(name, {"points": []})["points"]
            axes.plot([at / 60 for _, at, _ in points], [top1 for *_, top1 in points], marker=".", label=label)
        axes.set_title(f"{found['method']}, rate {found['rate']:g}", fontsize=10)
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1 accuracy, %")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--methods", default=",".join(METHODS))
    arguments.add_argument("--rates", default="0.05,0.1,0.2,0.4")
    arguments.add_argument("--runs", default=",".join(RUNS), help="of each cell; ours is needed")
    arguments.add_argument("--seconds", type=float, default=240)
    arguments.add_argument("--batch", type=int, default=BATCH, help="of tspc's finetuning")
    arguments.add_argument("--learning-rate", type=float, default=3e-3, help="of tspc's finetuning")
    arguments.add_argument("--distill-steps", type=int, default=30, help="of phase 1 for each block; 0: without it")
    arguments.add_argument("--limit", type=int, default=2000, help="test images for the looks on the way")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--picture", help="a PNG file for the curves")
    arguments.set_defaults(out="outputs/distill")
    options: argparse.Namespace = arguments.parse_args()
    torch.set_num_threads(options.threads)
    options.device = torch.device(options.device)
    config, data, reference = cifar_reference(options)
    place(reference, options.device).eval()
    pairs = [(m, float(r)) for m in options.methods.split(",") for r in options.rates.split(",")]
    cells = [cell(method, rate, config, data, reference, options) for method, rate in pairs]
    top1 = 100 * evaluate(reference, data, options.device).top1
    print(f"\nReference: {top1:.2f} %. {options.seconds:g} s for each cell, {options.threads} threads.")
    print(f"{machine(options.seed)}\n")
    theirs = ["gain", "times sooner"]
    head = ["method", "rate", "paper, blocks %", *theirs, "paper, finetuned %", *theirs]
    head += ["tspc: decompose → (distill →) finetune %", "phase 0 s", "tspc s"]
    print(table(head, [row(found) for found in cells]))
    if options.picture:
        draw(cells, Path(options.picture))


if __name__ == "__main__":
    main()
