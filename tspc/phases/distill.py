"""Phase 1: block after block learns to reproduce the reference network's activations (arXiv:1805.10352, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspc.blocks import find_blocks
from tspc.errors import ConfigError
from tspc.hooks import Reached, run_until_reached
from tspc.layers import tensorized_layers
from tspc.phases.context import Context
from tspc.training import Progress, Recipe, fit

BATCH_NORMS = ("frozen", "updated")


@dataclass(frozen=True)
class Distillation(Recipe):
    """A recipe for every block. `blocks` is a wildcard over module names; None finds them in the module tree.

    `batch_norm` says whether the block under training normalises by its running statistics, as the
    reference does (`frozen`), or by the batch's, updating them (`updated`).
    """

    blocks: str | None = None
    batch_norm: str = "updated"

    def problems(self, where: str) -> list[str]:
        wrong = [] if self.batch_norm in BATCH_NORMS else [f"choose one of {', '.join(BATCH_NORMS)}"]
        return super().problems(where) + [f"{where}.batch_norm={self.batch_norm!r}: {w}" for w in wrong]


class _BlockOutput:
    """The output of one block of a network; layers after the block are not run."""

    def __init__(self, model: nn.Module, block: str) -> None:
        self._model, self._name = model, block
        self._module = model.get_submodule(block)
        self._output: Any = None

    def __call__(self, images: Tensor) -> Tensor:
        self._output = None
        run_until_reached(self._model, [self._module.register_forward_hook(self._keep)], images)
        if not isinstance(self._output, Tensor):
            raise ConfigError(
                [
                    f"block {self._name} gives {type(self._output).__name__}, not one tensor; name others by "
                    "phase.distill.blocks='PATTERN'"
                ]
            )
        return self._output

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output
        raise Reached


def distill(
    model: nn.Module, reference: nn.Module, settings: Distillation, context: Context, progress: Progress
) -> None:
    """Trains the blocks of `model` in order, in place.

    Block k sees the input that the blocks before it, already trained and now frozen, really give it, and is
    asked for the reference's activation at that place (mean squared error). Layers outside every block with
    a tensorized layer equal the reference's and stay as they are.

    Raises TrainingError if a loss stops being finite, ConfigError if the pattern matches no block.
    """
    # In the reference, for the factors of a layer must not count as layers of a block.
    blocks = find_blocks(reference, list(tensorized_layers(model)), settings.blocks)
    reference.eval()
    progress.restore(model, stage=progress.stage)
    for number, block in enumerate(blocks):
        if number < progress.stage:
            continue
        _train_block(model, reference, block, number, len(blocks), settings, context, progress)
        progress.save(model, None, number + 1, 0, force=True)
    model.eval().requires_grad_(True)


def _train_block(
    model: nn.Module,
    reference: nn.Module,
    block: str,
    number: int,
    count: int,
    settings: Distillation,
    context: Context,
    progress: Progress,
) -> None:
    model.eval().requires_grad_(False)
    module = model.get_submodule(block).requires_grad_(True)
    for inner in module.modules():
        # Nothing but batch norm: dropout would only be noise against a reference that has none.
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            inner.train(settings.batch_norm == "updated")
    student, teacher = _BlockOutput(model, block), _BlockOutput(reference, block)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(images)
        return F.mse_loss(student(images), target)

    data = context.required_data
    total = settings.total_steps(data)
    with context.watch("distill", f"block {number + 1}/{count} {block}", total, block=block) as on_step:
        fit(
            model,
            module.parameters(),
            loss_of,
            data,
            settings,
            context.device,
            context.seed,
            stage=number,
            progress=progress,
            on_step=on_step,
        )
