"""What a network is for: what it answers with, and so how it is taught and judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tspc.data import IGNORED, OWN_KIND, TEXT_KINDS, Given, first_of, masks_of
from tspc.data import LOADED_KINDS as IMAGES
from tspc.data.spec import NO_DATA
from tspc.errors import ConfigError
from tspc.system import processes
from tspc.system.bounds import out_of_range, shown
from tspc.system.imports import named
from tspc.training.metrics import METRICS, Each, Metric

IMAGE_CLASSIFICATION = "image_classification"
TEXTS = (*TEXT_KINDS, OWN_KIND, NO_DATA)
OWN = (OWN_KIND, NO_DATA)
KINDS = {
    IMAGE_CLASSIFICATION: (*IMAGES, NO_DATA),
    "text_classification": TEXTS,
    "sentence_embeddings": TEXTS,
    "language_modelling": TEXTS,
    "regression": TEXTS,
    "speech": OWN,
    "custom": OWN,
}
"""For each task the kinds of data that it takes."""
ANSWERS = ("classes", "tokens", "embeddings", "values")
UNSUITED = {
    "tokens": ("top1", "top5"),
    "embeddings": ("top1", "top5", "perplexity"),
    "values": ("top1", "top5", "perplexity"),
}
"""For each kind of answer the metrics that need another one."""
REMEDY = "name another kind of answer: task.answers=classes, tokens, embeddings or values"


@dataclass(frozen=True)
class Task:
    """What a network is for. `answers` says what it gives, and so what its loss and its teacher's loss are:

    - `classes`: a score for each class (N, C, …), targets (N, …); cross-entropy, and the divergence from the
      reference's softened answers (Hinton, Vinyals & Dean, arXiv:1503.02531).
    - `tokens`: the same at every position (N, L, C), targets (N, L); a position with the target -100 does not count.
    - `embeddings`: vectors (N, D), without targets; one minus the cosine, and the relative squared error.
    - `values`: real numbers, targets of as many; the squared error.

    `loss` takes the place of the loss that compares with the targets: package.module:function of (answers, targets).
    """

    name: str = IMAGE_CLASSIFICATION
    answers: str = "classes"
    loss: str | None = None

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        found = out_of_range(self, where, {"name": tuple(KINDS), "answers": ANSWERS})
        if self.loss is not None and not all(self.loss.partition(":")):
            found.append(f"{where}.loss={shown(self.loss)}: expected package.module:function, or null")
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What of it changes a result; empty for the classification of images, which older runs know alone."""
        if self == Task():
            return {}
        return {"task": {"name": self.name, "answers": self.answers, "loss": self.loss}}

    @property
    def has_labels(self) -> bool:
        """Whether its data has targets to learn from."""
        return self.answers != "embeddings" or self.loss is not None

    @property
    def is_of_images(self) -> bool:
        return self.name == IMAGE_CLASSIFICATION

    @property
    def inputs(self) -> str:
        """What a network takes, in the words of a message."""
        return "images" if self.is_of_images else "inputs"

    @property
    def usual_metric(self) -> Metric:
        """What judges a network in training if nothing else does."""
        names = {"classes": "top1", "tokens": "perplexity", "embeddings": "cosine", "values": "mse"}
        return self.judged_by(METRICS[names[self.answers]])

    @property
    def metric_without_targets(self) -> Metric:
        """What tells how close a network is to the reference."""
        names = {"classes": "agreement", "tokens": "agreement", "embeddings": "cosine", "values": "mse"}
        return self.judged_by(METRICS[names[self.answers]])

    def stand_ins(self, batch: Given) -> Tensor:
        """Targets for a batch without any: whole numbers, of tokens -100 at padded positions."""
        masks = masks_of(batch)
        if self.answers != "tokens" or not masks:
            return torch.zeros(len(batch), dtype=torch.long, device=first_of(batch).device)
        # The answers are those of a decoder, if there is one; its mask comes after that of the encoder.
        return torch.where(masks[-1], 0, IGNORED)

    def judged_by(self, metric: Metric) -> Metric:
        """The metric for the answers of this task: of tokens, only the positions count that have a target.

        Raises ConfigError for a metric that says nothing of such answers.
        """
        unsuited = () if self.name == "custom" else UNSUITED.get(self.answers, ())
        if metric.name in unsuited:
            known = ", ".join(name for name in METRICS if name not in unsuited)
            raise ConfigError(
                [
                    f"metric={metric.name} does not suit task={self.name}, which answers with {self.answers}: "
                    f"choose one of {known}, or name package.module:function"
                ]
            )
        if self.answers != "tokens" or metric.each is None:
            return metric
        return replace(metric, each=_of_tokens(metric.name, metric.each), needs_labels=True)

    def loss_of(self, answer: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """How far answers are from the targets: a mean over the inputs. Raises ConfigError if they do not fit."""
        if self.loss is not None:
            return _by_user(self.loss, answer, targets)
        if self.answers == "tokens":
            losses = F.cross_entropy(answer.transpose(1, 2), targets, reduction="none", label_smoothing=smoothing)
            return _per_input(losses, targets).mean()
        if self.answers == "values":
            return F.mse_loss(answer.float().reshape(targets.shape), targets.float())
        return F.cross_entropy(answer, targets, label_smoothing=smoothing)

    def taught_by(self, answer: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """How far answers are from the reference's: a mean over the inputs."""
        if self.answers == "values":
            return F.mse_loss(answer.float(), wanted.float())
        if self.answers == "embeddings":
            apart = 1 - F.cosine_similarity(answer.float().flatten(1), wanted.float().flatten(1), dim=1)
            return apart.mean() + relative_error(answer, wanted)
        axis = 2 if self.answers == "tokens" else 1
        ours, theirs = (F.log_softmax(values.float() / temperature, dim=axis) for values in (answer, wanted))
        if self.answers == "tokens":
            divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis)
            return _per_input(divergence * (targets != IGNORED), targets).mean() * temperature**2
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2

    def check_answer(self, answer: Tensor, targets: Tensor, num_classes: int, name: str) -> None:
        """Raises ConfigError if the answers of the network of this name have another form than the task says."""
        found: tuple[int, ...] = tuple(answer.shape)
        wanted = tuple(targets.shape)
        whole = "whole numbers" if not targets.is_floating_point() else "real numbers"
        told = f"{name} answers with shape {found}, and the targets are {whole} of shape {wanted}"
        if self.answers == "classes" and found != (len(targets), num_classes):
            raise ConfigError(
                [f"{name} gives {found[1:]} values for an input; the data has {num_classes} classes; {REMEDY}"]
            )
        if self.loss is not None:
            return
        if self.answers == "embeddings" and len(found) != 2:
            raise ConfigError([f"{told}; task.answers=embeddings needs a vector for each input, (N, D); {REMEDY}"])
        if self.answers == "tokens" and (len(found) != 3 or found[:2] != wanted or targets.is_floating_point()):
            raise ConfigError([f"{told}; task.answers=tokens needs (N, L, C) and whole numbers (N, L); {REMEDY}"])
        if self.answers == "tokens" and found[-1] < num_classes:
            told = f"{name} gives {found[-1]} scores at every position"
            raise ConfigError([f"{told}; task.answers=tokens needs a score for each of {num_classes} tokens"])
        if self.answers == "values" and answer.numel() != targets.numel():
            raise ConfigError([f"{told}; task.answers=values needs as many of both; {REMEDY}"])


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error ÷ the variance of the target, over the batches of all processes."""
    target = target.float()
    return F.mse_loss(output.float(), target) / _variance(target).clamp(min=1e-12)


def _variance(tensor: Tensor) -> Tensor:
    count = torch.tensor(float(tensor.numel()), dtype=tensor.dtype, device=tensor.device)
    number, total = processes.summed(torch.stack((count, tensor.sum())))
    return processes.summed((tensor - total / number).square().sum()) / number


def _per_input(each: Tensor, targets: Tensor) -> Tensor:
    """The mean over the positions of each input (N, L) that have a target."""
    return each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def _of_tokens(name: str, each: Each) -> Each:
    """A metric's numbers for each input, from answers (N, L, C)."""

    def numbers(answer: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
        if name == "perplexity":
            return each(answer.transpose(1, 2), targets, None)
        assert wanted is not None
        if name == "agreement":
            found = (answer.argmax(2) == wanted.argmax(2)).float()
        elif name == "cosine":
            found = F.cosine_similarity(answer.float(), wanted.float(), dim=2)
        else:
            found = (answer.float() - wanted.float()).square().mean(2)
        if targets.shape != found.shape:  # stand-ins that know no positions
            return found.mean(1)
        return _per_input(found * (targets != IGNORED), targets)

    return numbers


def _by_user(name: str, answer: Tensor, targets: Tensor) -> Tensor:
    function = named(name, "task.loss")
    try:
        found = function(answer, targets)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError([f"task.loss={name!r} failed: {type(error).__name__}: {error}"]) from error
    if not (isinstance(found, Tensor) and found.ndim == 0):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError([f"task.loss={name!r} returned {what}; expected one number, as a tensor"])
    return found
