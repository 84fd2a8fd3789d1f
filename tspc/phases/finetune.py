"""Training with the task's loss: phase 2, and the making of a reference network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tspc.phases.context import Context
from tspc.training import Progress, Recipe, fit


def train_classifier(model: nn.Module, recipe: Recipe, context: Context, progress: Progress, phase: str) -> None:
    """Trains all parameters of `model` end to end with cross-entropy, in place.

    Raises TrainingError if the loss stops being finite.
    """
    data = context.required_data
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)

    total = recipe.total_steps(data)
    with context.watch(phase, f"{total} steps", total) as on_step:
        parameters = model.parameters()
        fit(model, parameters, loss_of, data, recipe, context.device, context.seed, progress=progress, on_step=on_step)
    model.eval()
