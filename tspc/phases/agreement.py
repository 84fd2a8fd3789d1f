"""How often a network gives the reference's class, and whether training made that worse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tspc.data import IGNORED, Given, answer_of, called, filled, masks_of
from tspc.phases.context import Context
from tspc.system import processes
from tspc.training import AGREEMENT, Again, Metric, Task, losses, measure
from tspc.traversal.hooks import evaluating

Images = Callable[[], Iterable[Given]]
T = TypeVar("T")


@torch.no_grad()
def keep_better_(
    model: nn.Module, start: dict[str, Tensor], reference: nn.Module, images: Images, context: Context
) -> None:
    """Undoes the training if the network agrees with the reference less than before.

    Every block can be closer to its target and the whole network still be farther away, if little of it is left. The
    network is set back to `start` if it gave the reference's class on more of the images then, by more than two
    standard deviations of that difference (McNemar, 1947). A network that does not classify is not changed.

    The images have no labels. If the run's metric needs none either, such as the cosine, its numbers for each image
    decide in the same way, for any network. So do those of the task's own one where the answers are no classes.
    """
    metric, has_classes = context.metric, context.task.answers == "classes"
    if not has_classes and not metric.needs_reference:
        metric = context.task.metric_without_targets
    is_other = not has_classes or (metric.needs_reference and metric.name != AGREEMENT.name)
    wanted = None if is_other else _classes(reference, images)
    if wanted is None:
        if metric.needs_reference:
            _keep_better_by_(metric, model, start, reference, images, context)
        return
    before, after = _before_and_after(model, start, lambda: _classes(model, images) == wanted)
    lost, gained = before & ~after, after & ~before
    counts = torch.stack([flags.sum() for flags in (lost, gained, before, after, torch.ones_like(after))])
    lost, gained, before, after, count = processes.summed(counts).tolist()
    if lost - gained <= 2 * math.sqrt(lost + gained):
        return
    model.load_state_dict(start)
    context.note({"phase": "distill", "event": "undone", "before": before, "after": after, "images": count})
    text = f"before it the network gave the reference's class on {before:,} of {count:,} training {context.task.inputs}"
    context.display.line(f"distill    undone: {text}, after it on {after:,}")


def _keep_better_by_(
    metric: Metric, model: nn.Module, start: dict[str, Tensor], reference: nn.Module, images: Images, context: Context
) -> None:
    # The targets are whole numbers, and so class numbers: the reference's answers are the goal.
    batches = Again(lambda: ((batch, context.task.stand_ins(batch)) for batch in images()))
    judge = lambda: measure(metric, model, batches, context.device, reference)  # noqa: E731
    before, after = _before_and_after(model, start, judge)
    lost = losses(metric, before, after)
    assert lost is not None, "the metrics that compare with the reference have a number for each input"
    # Of numbers that are 0, 1 and -1 this is McNemar's test.
    if float(lost.sum()) <= 2 * math.sqrt(float(lost.square().sum())):
        return
    model.load_state_dict(start)
    note = {"before": before.value, "after": after.value, "images": after.count}
    context.note({"phase": "distill", "event": "undone"} | note)
    texts = f"{metric.text(before.value)}, after it {metric.text(after.value)}"
    context.display.line(
        f"distill    undone: {metric.label} on {after.count:,} training {context.task.inputs} was {texts}"
    )


@torch.no_grad()
def keep_closer_(
    model: nn.Module, start: dict[str, Tensor], reference: nn.Module, images: Images, context: Context
) -> None:
    """Undoes the training if the network's answers are now farther from the reference's.

    Factors that were trained and rounded again may have lost more than they had gained. The distance is the squared
    error over the images, relative to the size of the reference's answers. A network whose answer is not a tensor is
    not changed.
    """
    before, after = _before_and_after(model, start, lambda: _error(model, reference, images))
    if after is None or before is None or after <= before:
        return
    model.load_state_dict(start)
    context.note({"phase": "distill", "event": "undone", "before": before, "after": after})
    context.display.line(f"distill    undone: the relative error of the answers was {before:.3g}, after it {after:.3g}")


def _before_and_after(model: nn.Module, start: dict[str, Tensor], judge: Callable[[], T]) -> tuple[T, T]:
    """What a judge says of the model at its `start`, and of the model as it is now."""
    after, trained = judge(), copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    before = judge()
    model.load_state_dict(trained)
    return before, after


def _error(network: nn.Module, reference: nn.Module, images: Images) -> float | None:
    """The relative squared error of the answers of all processes; None if they are no tensors."""
    sums: list[Tensor] = []
    with evaluating(network), evaluating(reference):
        for batch in images():
            answer, wanted = answer_of(called(network, batch)), answer_of(called(reference, batch))
            if answer is None or wanted is None:
                return None
            answer, wanted = (filled(found, masks_of(batch)) for found in (answer, wanted))
            sums.append(torch.stack([(answer - wanted).float().square().sum(), wanted.float().square().sum()]))
    if not sums:
        return None
    error, size = processes.summed(torch.stack(sums).sum(0)).tolist()
    return error / size if size > 0 else error


def _classes(network: nn.Module, images: Images) -> Tensor | None:
    """The class of each image; None if the network does not classify."""
    found: list[Tensor] = []
    with evaluating(network):
        for batch in images():
            answer = answer_of(called(network, batch))
            if answer is None or answer.ndim != 2:
                return None
            found.append(answer.argmax(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=next(network.parameters()).device)


@dataclass(frozen=True)
class Apart:
    """How far a network is from the reference: 0 if both answer the same, 1 if they agree by chance alone.

    `counts` of (answers, the reference's answers, targets) are added up over batches, and `distance` reads a list of
    them. `name` is that of one minus the distance.
    """

    name: str
    counts: Callable[[Tensor, Tensor, Tensor], Tensor]
    distance: Callable[[Sequence[Tensor]], float]

    @classmethod
    def of(cls, task: Task) -> Apart:
        """For the answers of a task."""
        if task.answers == "classes":
            return cls("κ", lambda answer, wanted, targets: class_counts(answer, wanted), distance)
        if task.answers == "tokens":
            return cls("κ", _token_counts, distance)
        return cls("R²", lambda answer, wanted, targets: _moments(answer, wanted), _unexplained)


def _token_counts(answer: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
    """The class counts of the positions (N, L, C) that have a target (N, L)."""
    counted = targets != IGNORED
    return class_counts(answer[counted], wanted[counted])


def _moments(answer: Tensor, wanted: Tensor) -> Tensor:
    """The squared error, and of the reference's answers the number, the sum and the sum of squares."""
    wide = torch.float32 if wanted.device.type == "mps" else torch.float64
    goal = wanted.to(wide)
    count = torch.tensor(float(goal.numel()), dtype=wide, device=goal.device)
    return torch.stack([(answer.to(wide) - goal).square().sum(), count, goal.sum(), goal.square().sum()])


def _unexplained(moments: Sequence[Tensor]) -> float:
    """The squared error ÷ that of the mean answer, at most 1."""
    error, count, total, squares = processes.summed(torch.stack(list(moments)).sum(0)).tolist()
    spread = squares - total**2 / count
    return min(1.0, error / spread) if spread > 0 else 1.0


def class_counts(answer: Tensor, wanted: Tensor) -> Tensor:
    """Of two answers (N, C, …): how many classes differ, then how often the one names each class, and the other."""
    own, other = answer.argmax(1).flatten(), wanted.argmax(1).flatten()
    named = (classes.bincount(minlength=answer.shape[1]) for classes in (own, other))
    return torch.cat(((own != other).sum()[None], *named))


def distance(counts: Sequence[Tensor]) -> float:
    """1 − κ (Cohen, 1960) from the `class_counts` of all batches of all processes: 0 agrees, 1 agrees by chance.

    If both networks always name the same single class, nothing is known, and the result is 1.
    """
    differing, *named = processes.summed(torch.stack(list(counts)).sum(0)).tolist()
    own, other = named[: len(named) // 2], named[len(named) // 2 :]
    by_chance = 1 - sum(p * q for p, q in zip(own, other, strict=True)) / sum(own) ** 2
    return differing / sum(own) / by_chance if by_chance > 0 else 1.0
