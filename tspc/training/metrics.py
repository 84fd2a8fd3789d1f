"""What judges a network: top-1, another metric that is built in, or a function of the user's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tspc.data import IGNORED
from tspc.errors import ConfigError, DataError, shortened
from tspc.store.scores import SCALES, Scale, record_of, scale_of
from tspc.system.imports import named
from tspc.system.processes import ALONE, Share

Each = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""From answers (N, …), targets and the reference's answers (None without a reference): a number for each input, (N)."""

Function = Callable[..., Any]
"""A user's metric. It gets the network, in eval mode, and an iterable of batches (inputs, targets) on the device, which
can be read several times. It returns a number, higher is better, or a tensor (N) with a number for each input; then
the mean is the value."""

REMEDY = "it gets (model, batches) and returns a number, higher is better, or a tensor with a number for each input"


@dataclass(frozen=True, kw_only=True)
class Metric(Scale):
    """What judges a network, and how its numbers are read.

    `each` gives a number for each input, and the value is a function of their mean. A user's `function` takes its
    place. With `needs_reference` the answers are compared with those of the reference. Without `needs_labels` the
    targets of the batches do not matter.
    """

    each: Each | None = field(default=None, repr=False)
    needs_reference: bool = False
    needs_labels: bool = True
    function: Function | None = field(default=None, repr=False)

    @property
    def has_counts(self) -> bool:
        """Whether each input is right or wrong."""
        return self.is_proportion and self.each is not None

    def uses_reference(self, targets: Tensor) -> bool:
        """Whether the reference's answers are needed. A squared error is that from float targets if there are any."""
        return self.needs_reference and not (self.name == "mse" and targets.is_floating_point())

    def share_of(self, own: Share) -> Share:
        """The part of the inputs that this process measures, which is `own` unless the function is the user's.

        The number that such a function returns cannot be put together from parts, so each process measures everything.
        """
        return own if self.function is None else ALONE


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a metric says of a network, over `count` inputs.

    `each` has a float for each input, in the order of the batches, on the CPU; with several processes those of the
    first one come first. `value` is a function of their mean. It is None if a user's function gave only a number.
    `top5` is the share among five that stands beside top-1, from 100 classes on.
    """

    metric: Metric
    value: float
    count: int
    each: Tensor | None = field(default=None, repr=False, compare=False)
    top5: float | None = None

    @property
    def points(self) -> float:
        """100 · value for a share, else the value."""
        return self.metric.points(self.value)

    def to_dict(self) -> dict[str, Any]:
        """The record on disk."""
        return record_of(self.metric, self.value, self.count, self.top5)


class Again:
    """Batches that can be read several times: every pass calls `read`."""

    def __init__(self, read: Callable[[], Iterable[Any]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        yield from self._read()


def _classes(name: str, answer: Tensor, targets: Tensor) -> Tensor:
    """The targets, if they are numbers of classes for answers (N, C, …). Raises DataError for anything else."""
    due = (len(answer), *answer.shape[2:])
    if tuple(targets.shape) != due:
        remedy = "; one-hot targets become numbers by argmax(1)" if targets.shape == answer.shape else ""
        found = f"they have shape {tuple(targets.shape)}, {targets.dtype}"
        raise DataError(f"metric={name} needs the number of a class for each target, shape {due}; {found}{remedy}")
    return targets


def _known_classes(answer: Tensor, targets: Tensor) -> Tensor:
    """The same for perplexity, whose targets must be whole numbers of classes that are there; -100 does not count."""
    targets = _classes("perplexity", answer, targets)
    if targets.is_floating_point():
        raise DataError(f"metric=perplexity needs whole numbers of classes as targets; they are {targets.dtype}")
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= answer.shape[1]))]
    if len(wrong):
        raise DataError(
            f"metric=perplexity: a target is {int(wrong[0])}, and the answers have {answer.shape[1]} classes"
        )
    return targets


def right_among(answer: Tensor, labels: Tensor, most: int) -> Tensor:
    """1 for each input whose label is among the `most` largest of the answers (N, C), else 0."""
    # One choice for both numbers of a network, so that equal answers are told apart in the same way.
    hits = answer.topk(min(5, answer.shape[1]), dim=1).indices == labels[:, None]
    return hits[:, :most].any(1).float()


def _agreement(answer: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
    """The share of an input's classes that equal the reference's: 0 or 1, or a share if there are positions."""
    assert wanted is not None
    return _means((answer.argmax(1) == wanted.argmax(1)).float())


def _cosine(answer: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
    assert wanted is not None
    return F.cosine_similarity(_rows(answer), _rows(wanted), dim=1)


def _cross_entropy(answer: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
    """The mean over the positions of an input; positions with the target -100 do not count."""
    losses = F.cross_entropy(answer.float(), _known_classes(answer, targets), reduction="none")
    counted = (targets != IGNORED).float()
    return _rows(losses).sum(1) / _rows(counted).sum(1).clamp(min=1)


def _squared_error(answer: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
    goal = targets if targets.is_floating_point() else wanted
    assert goal is not None
    if answer.numel() != goal.numel():
        found, due = tuple(answer.shape), tuple(goal.shape)
        raise ConfigError([f"metric=mse: the network answers with shape {found}, but the targets have {due}"])
    return (_rows(answer) - _rows(goal)).square().mean(1)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.float().reshape(len(tensor), -1)


def _means(tensor: Tensor) -> Tensor:
    return _rows(tensor).mean(1)


def _built_in(name: str, each: Each, needs_reference: bool = False) -> Metric:
    return Metric(**vars(SCALES[name]), each=each, needs_reference=needs_reference, needs_labels=not needs_reference)


TOP1 = _built_in("top1", lambda answer, targets, _: right_among(answer, _classes("top1", answer, targets), 1))
AGREEMENT = _built_in("agreement", _agreement, needs_reference=True)
METRICS = {
    metric.name: metric
    for metric in (
        TOP1,
        _built_in("top5", lambda answer, targets, _: right_among(answer, _classes("top5", answer, targets), 5)),
        AGREEMENT,
        _built_in("cosine", _cosine, needs_reference=True),
        _built_in("perplexity", _cross_entropy),
        _built_in("mse", _squared_error, needs_reference=True),
    )
}
"""The metrics that are built in, by name."""


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a metric, as far as its text shows; None if nothing is."""
    if name in METRICS or all(name.partition(":")):
        return None
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"metric={shortened(name)}: choose one of {', '.join(METRICS)}, or name package.module:function{hint}"


def metric_of(chosen: str | Function | Metric) -> Metric:
    """The metric with this name, or a user's function: the function itself, or as package.module:function.

    Raises ConfigError for an unknown name, and for a function that cannot be imported or called.
    """
    if isinstance(chosen, Metric):
        return chosen
    if not isinstance(chosen, str):
        if not callable(chosen):
            raise ConfigError([f"metric={shortened(chosen)}: expected a name or a function; {REMEDY}"])
        return Metric(**vars(scale_of(name_of(chosen))), function=chosen)
    if chosen in METRICS:
        return METRICS[chosen]
    if (problem := name_problem(chosen)) is not None:
        raise ConfigError([problem])
    function = named(chosen, "metric")
    if not callable(function):
        raise ConfigError([f"metric={chosen!r} is {type(function).__name__}, not a function; {REMEDY}"])
    return Metric(**vars(scale_of(chosen)), function=function)


def name_of(function: Function) -> str:
    """The text that names a function, as package.module:function."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}:{name}"


def drop(reference: Score, score: Score) -> float:
    """How much worse a score is than the reference's, in points; negative if it is better."""
    return score.metric.drop(reference.value, score.value)


def losses(metric: Metric, reference: Score, score: Score) -> Tensor | None:
    """For each input how much worse the network is than the reference, in points; their mean is the `drop`.

    None if there are no numbers for each input, or if the value is not their mean: perplexity is the exponential of a
    mean. Paired bounds then use the values of groups of batches.
    """
    if metric.name == "perplexity" or reference.each is None or score.each is None:
        return None
    before, after = reference.each, score.each
    if before.shape != after.shape:
        raise ConfigError([f"metric={metric.name}: {len(before)} inputs and {len(after)} inputs cannot be paired"])
    lost = before - after if metric.is_higher_better else after - before
    return 100 * lost if metric.is_share else lost
