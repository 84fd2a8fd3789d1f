"""Training of a whole network: phase 2, and the training of a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tspc.compression.beside import narrow_beside_, wide_parameters
from tspc.compression.integers import on_grids
from tspc.data import Given, answer_of, answered, at_once, filled, masks_of
from tspc.layers.forms import tensorized_layers
from tspc.layers.learning import with_learning_factors
from tspc.phases.agreement import Apart
from tspc.phases.batch_norm import SHOWN, rebase_
from tspc.phases.context import Context
from tspc.phases.phase import NetworkPhase, Work
from tspc.system.bounds import SHARE, Bounds, out_of_range
from tspc.system.modes import own_modes
from tspc.training import Again, Labelled, LossOf, Metric, Progress, Recipe, Watchers, fit, measure, relative_error
from tspc.traversal.blocks import find_blocks
from tspc.traversal.hooks import outputs_of

LEAST_APART = 0.01
"""The smallest distance from the reference that counts, because 512 images cannot show a smaller one."""


@dataclass(frozen=True)
class Finetuning(Recipe):
    """A recipe, and what the reference network teaches.

    `distillation` is the share of the loss that compares with the reference's answers at `temperature` (Hinton, Vinyals
    & Dean, arXiv:1503.02531). The rest of the loss compares with the labels. `features` is the weight of a third part:
    the mean squared error of the blocks' outputs, relative to the variance of the reference's outputs, mean over the
    blocks (Romero et al., "FitNets", ICLR 2015).

    The distance from the reference is 1 − κ (Cohen, 1960): 0 if both networks give the same class to every image, 1 if
    they agree by chance alone. Of numbers and embeddings it is the relative squared error, at most 1. If it is below
    `careful_below`, the learning rate is reduced in proportion, because large steps would first make the network worse.
    The learning rate is not reduced with `careful_below=0`, nor if the loss does not use the reference.

    If the data has no targets, as that of sentence embeddings, the whole loss is the comparison with the reference.
    """

    distillation: float = 0.9
    temperature: float = 4.0
    features: float = 1.0
    careful_below: float = 0.3
    optimizer: str = "adam"
    warmup: float = 0.05
    held_out: int = 1000

    @property
    def is_careful(self) -> bool:
        """Whether the learning rate depends on the distance from the reference."""
        return self.careful_below > 0 and (self.distillation > 0 or self.features > 0)

    def problems(self, where: str) -> list[str]:
        bounds = {
            "distillation": SHARE,
            "temperature": Bounds(0.01, 1e4),
            "features": Bounds(0, 1e6),
            "careful_below": SHARE,
        }
        return super().problems(where) + out_of_range(self, where, bounds)


@own_modes(exact=False)
def train_classifier(model: nn.Module, recipe: Recipe, context: Context, progress: Progress, phase: str) -> None:
    """Trains all parameters of `model` with the loss of the task, in place: of classes with cross-entropy.

    Held-out images judge it by the task's own metric, such as top-1: another metric would make another reference, and
    the runs that share it could not be compared. Raises TrainingError if the loss stops being finite.
    """

    def loss_of(network: nn.Module, images: Given, labels: Tensor) -> Tensor:
        return context.task.loss_of(answered(network, images), labels, recipe.label_smoothing)

    _train(model, recipe, context, progress, phase, loss_of, context.task.usual_metric)


@own_modes(exact=False)
@with_learning_factors
def finetune(
    model: nn.Module, reference: nn.Module, settings: Finetuning, context: Context, progress: Progress, phase: str
) -> None:
    """Trains all parameters of `model` on the labels and on the reference's answers, in place.

    The result is the state that is best on the held-out images, by the metric of the context. Factors on grids stay
    there: the network computes with rounded values, and the gradient goes straight through to the values behind them.

    Raises TrainingError if the loss stops being finite.
    """
    reference.eval()
    task, wide = context.task, wide_parameters(model)
    share = settings.distillation if task.has_labels else 1.0
    blocks = find_blocks(reference, list(tensorized_layers(model, tables=False))) if settings.features else []
    with outputs_of(reference, blocks) as wanted, outputs_of(model, blocks) as given:

        def loss_of(network: nn.Module, images: Given, labels: Tensor) -> Tensor:
            with torch.no_grad():
                target = answered(reference, images)
            answer = answered(network, images)
            loss = share * task.taught_by(answer, target, labels, settings.temperature)
            if task.has_labels:
                loss = loss + (1 - share) * task.loss_of(answer, labels, settings.label_smoothing)
            if blocks:
                loss = (
                    loss
                    + settings.features
                    * torch.stack([_feature_error(given[b], wanted[b], masks_of(images)) for b in blocks]).mean()
                )
            return loss

        found, apart = [], Apart.of(task)

        def show() -> None:
            batches = context.required_data.train_batches(context.feed(settings), epoch=0)
            for images, targets in islice(batches, math.ceil(SHOWN / settings.batch_size)):
                answer = answered(model, images)
                if settings.is_careful:
                    found.append(apart.counts(answer, answered(reference, images), targets))

        recipe = settings
        if not progress.is_under_way():  # else the saved state would replace what is prepared here
            rebase_(model, show)
            recipe = _careful(settings, apart, found, context, phase) if settings.is_careful else settings
        _train(model, recipe, context, progress, phase, loss_of, context.metric, reference)
    if on_grids(model):
        narrow_beside_(model, wide)


def _careful(settings: Finetuning, apart: Apart, counts: list[Tensor], context: Context, phase: str) -> Finetuning:
    """The settings, with the learning rate for a network at the distance from the reference that `counts` show."""
    distance = apart.distance(counts)
    if not distance < settings.careful_below:
        return settings
    share = max(distance, LEAST_APART) / settings.careful_below
    careful = replace(settings, learning_rate=settings.learning_rate * min(1.0, share))
    context.note({"phase": phase, "event": "careful", "apart": distance, "learning_rate": careful.learning_rate})
    text = f"learning rate {careful.learning_rate:.2g} instead of {settings.learning_rate:.2g}"
    close = f"({apart.name} = {1 - distance:.3f})"
    context.display.line(f"{phase:<9}  {text}, because the network is close to the reference {close}")
    return careful


def _feature_error(output: Any, target: Any, masks: list[Tensor]) -> Tensor:
    """The relative error of a block's output, or of the tensor that counts in it, without padded positions."""
    found, wanted = answer_of(output), answer_of(target)
    assert found is not None, "a block with layers gives a tensor"
    assert wanted is not None, "a block with layers gives a tensor"
    return relative_error(filled(found, masks), filled(wanted, masks))


def _train(
    model: nn.Module,
    recipe: Recipe,
    context: Context,
    progress: Progress,
    phase: str,
    loss_of: LossOf,
    metric: Metric,
    reference: nn.Module | None = None,
) -> None:
    model.train().requires_grad_(True)
    data, feed = context.required_data, context.feed(recipe)
    batches = Labelled(data, feed)

    def judge(network: nn.Module) -> float:
        share = metric.share_of(feed.share)
        held_out = Again(
            lambda: data.held_out_batches(feed.held_out, at_once(data), context.device, share, feed.reserved)
        )
        score = measure(metric, network, held_out, context.device, reference, num_classes=data.num_classes)
        return metric.gain(score.value)

    total = recipe.total_steps(batches.per_epoch)
    with context.watch(phase, f"{total} steps", total, recipe.batch_size) as on_step:
        watchers = Watchers(on_step, judge if feed.held_out else None)
        fit(
            model,
            batches,
            loss_of,
            recipe,
            context.hardware,
            context.seed,
            progress=progress,
            watchers=watchers,
        )
    model.eval()


def _run(work: Work) -> tuple[nn.Module, None]:
    finetune(work.start, work.reference, work.settings, work.context, work.progress, PHASE.name)
    return work.start, None


PHASE = NetworkPhase("finetune", Finetuning, run=_run, needs_data=True)
