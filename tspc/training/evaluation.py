"""Measures a network by a metric, over the inputs of all processes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data import Batch, Data, ModelInputs, answer_of, at_once, called, masks_of, unpadded
from tspc.errors import ConfigError, TspcError
from tspc.system import processes
from tspc.system.modes import own_modes
from tspc.training.metrics import REMEDY, TOP1, Again, Metric, Score, right_among
from tspc.traversal.hooks import evaluating, seeded

MANY = 100
"""From this number of classes on, the share of right answers among five is told beside top-1."""
LARGEST, LARGEST_EXPONENT = 1e300, 690.0
"""The largest number in a record, and the largest mean of a perplexity, whose exponential is about as large."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, in [0, 1]. `top5` exists from 100 classes on. `images` is the number of images."""

    top1: float
    top5: float | None
    images: int

    def to_dict(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "images": self.images}


def evaluate(
    model: nn.Module, data: Data, device: torch.device, *, limit: int | None = None, batch_size: int = 250
) -> Accuracy:
    """Accuracy on the test split, or on a fixed random subset of `limit` images; the modes of `model` are restored."""
    return _accuracy_of(judged(TOP1, model, data, device, limit=limit, batch_size=batch_size))


def accuracy(model: nn.Module, batches: Iterable[Batch], num_classes: int, device: torch.device) -> Accuracy:
    """Accuracy over the batches of this process and of all others."""
    return _accuracy_of(measure(TOP1, model, batches, device, num_classes=num_classes))


def _accuracy_of(score: Score) -> Accuracy:
    return Accuracy(score.value, score.top5, score.count)


def judged(
    metric: Metric,
    model: nn.Module,
    data: Data,
    device: torch.device,
    reference: nn.Module | None = None,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
) -> Score:
    """What the metric says of a network on the test split, or on a fixed random subset of `limit` images.

    The processes share the images. The `batch_size` is the usual one of the data if it is None. Raises ConfigError as
    `measure` does.
    """
    share = metric.share_of(processes.share())
    batches = Again(lambda: data.test_batches(batch_size or at_once(data), device, limit, share))
    return measure(metric, model, batches, device, reference, num_classes=data.num_classes)


@own_modes(exact=False)
@torch.no_grad()
def measure(
    metric: Metric,
    model: nn.Module,
    batches: Iterable[Any],
    device: torch.device,
    reference: nn.Module | None = None,
    *,
    num_classes: int | None = None,
) -> Score:
    """What the metric says of a network on batches (inputs, targets), which are on the `device`.

    Several processes together have the inputs of all; a user's function instead gets all batches in each of them
    (`Metric.share_of`). The modes of the networks are restored. `num_classes` is what the targets know of.

    Raises ConfigError if the metric lacks a reference, if the answers do not suit it, or if a user's function fails or
    returns something else than numbers; DataError if the targets do not; TspcError if the result is not finite.
    """
    with evaluating(model), nullcontext() if reference is None else evaluating(reference):
        if metric.function is not None:
            return _by_user(metric, metric.function, model, batches, device)
        parts, fifth = [torch.zeros(0, device=device)], [torch.zeros(0, device=device)]
        for number, (inputs, targets) in enumerate(batches):
            answer, wanted = _answers(metric, model, reference, inputs, targets, number)
            _check_answer(metric, answer, num_classes)
            assert metric.each is not None
            parts.append(metric.each(answer, targets, wanted))
            if metric.name == TOP1.name and (num_classes or answer.shape[1]) >= MANY:
                fifth.append(right_among(answer, targets, 5))
    each, five = (processes.gathered(torch.cat(part).float()).cpu() for part in (parts, fifth))
    if not len(each):
        raise ConfigError([f"metric={metric.name}: there are no inputs to measure"])
    return Score(
        metric=metric,
        value=_value(metric, each),
        count=len(each),
        each=each,
        top5=_mean(five) if len(five) else None,
    )


def _answers(
    metric: Metric, model: nn.Module, reference: nn.Module | None, inputs: Any, targets: Tensor, number: int
) -> tuple[Tensor, Tensor | None]:
    """The answers of both networks, on the device of the first; None for the reference if it does not matter."""
    if not metric.uses_reference(targets):
        return _tensor(metric, called(model, inputs)), None
    if reference is None:
        raise ConfigError([f"metric={metric.name} compares answers with the reference's, and there is no reference"])
    with seeded(number):
        answer = _tensor(metric, called(model, inputs))
    masks = masks_of(inputs) if isinstance(inputs, ModelInputs) else []
    answer = unpadded(answer, masks)
    if reference is model:
        return answer, answer
    place = next(chain(reference.parameters(), reference.buffers()), answer).device
    with seeded(number):
        moved = inputs.to(place) if isinstance(inputs, Tensor | ModelInputs) else inputs
        wanted = _tensor(metric, called(reference, moved))
    if wanted.shape != answer.shape:
        shapes = f"{tuple(answer.shape)}, but the reference with {tuple(wanted.shape)}"
        raise ConfigError([f"metric={metric.name}: the network answers with shape {shapes}"])
    return answer, unpadded(wanted.to(answer.device), masks)


def _tensor(metric: Metric, answer: Any) -> Tensor:
    found = answer_of(answer)
    if found is not None and found.ndim:
        return found
    what = f"its answer is {type(answer).__name__}"
    raise ConfigError([f"metric={metric.name} needs a network that gives one tensor; {what}: name a function instead"])


def _check_answer(metric: Metric, answer: Tensor, num_classes: int | None) -> None:
    """Raises ConfigError if answers do not have the shape that the metric reads."""
    shape = tuple(answer.shape)
    if metric.name in ("top1", "top5") and (len(shape) != 2 or shape[1] != (num_classes or shape[1])):
        classes = "no classes (N, C) are given" if num_classes is None else f"the data has {num_classes} classes"
        raise ConfigError([f"the network answers with shape {shape}, but {classes}"])
    if metric.name in ("agreement", "perplexity") and len(shape) < 2:
        raise ConfigError([f"metric={metric.name} needs answers (N, C, …), and the network answers with shape {shape}"])


def _value(metric: Metric, each: Tensor) -> float:
    mean = _mean(each)
    if not math.isfinite(mean):
        raise TspcError(f"metric={metric.name} is {mean}: the network's answers are not finite numbers")
    return math.exp(min(mean, LARGEST_EXPONENT)) if metric.name == "perplexity" else mean


def _mean(each: Tensor) -> float:
    return float(each.double().sum()) / len(each)


class _Counted:
    """Batches for a user's function; `count` is the number of inputs in the longest pass over them."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self.count = batches, 0

    def __iter__(self) -> Iterator[Any]:
        own = 0
        for batch in self._batches:
            own += len(batch[1])
            self.count = max(self.count, own)
            yield batch


def _by_user(
    metric: Metric, function: Callable[..., Any], model: nn.Module, batches: Iterable[Any], device: torch.device
) -> Score:
    counted = _Counted(batches)
    try:
        found = function(model, counted)
    except TspcError:  # of the data, or of a network in another runtime
        raise
    except Exception as error:  # the user's own code may raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError([f"metric={metric.name} failed: {text}; {REMEDY}"]) from error
    each = found.detach().float().cpu() if _has_each(found) else None
    if each is not None and counted.count not in (0, len(each)):
        counts = f"{len(each)} numbers for {counted.count} inputs"
        raise ConfigError([f"metric={metric.name} returned {counts}; {REMEDY}"])
    value = _number(metric, found) if each is None else _mean(each)
    if not abs(value) <= LARGEST:  # also if it is not a number
        seen = f" for {counted.count} inputs" if counted.count else ""
        raise ConfigError([f"metric={metric.name} returned {value}{seen}; {REMEDY}"])
    if processes.count() > 1:  # all must choose by the same number, and the last digits may differ
        value = float(processes.summed(torch.tensor(value, dtype=torch.float64, device=device))) / processes.count()
    return Score(metric=metric, value=value, count=counted.count if each is None else len(each), each=each)


def _has_each(found: Any) -> bool:
    return isinstance(found, Tensor) and found.ndim == 1 and len(found) > 0 and not found.is_complex()


def _number(metric: Metric, found: Any) -> float:
    """A number, or a tensor that holds one. Raises ConfigError for anything else."""
    if isinstance(found, Tensor) and found.ndim == 0 and not found.is_complex():
        return float(found)
    if isinstance(found, numbers.Real) and not isinstance(found, bool):
        try:
            return float(found)
        except OverflowError:  # a whole number of hundreds of digits
            return math.inf
    what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ConfigError([f"metric={metric.name} returned {what}; {REMEDY}"])
