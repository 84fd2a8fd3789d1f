"""The optimisation loop that every training phase shares, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data import Data
from tspc.errors import ConfigError, TrainingError, out_of_range
from tspc.files import write_atomically

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine", "step")


@dataclass(frozen=True)
class Recipe:
    """How to optimise. `steps` (optimizer steps), where given, replaces `epochs` (passes over the data).

    SGD is Nesterov's wherever there is momentum. `warmup` is the share of all steps over which the learning
    rate rises linearly from zero. The `step` schedule divides it by ten after half and after three quarters
    of the steps.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    steps: int | None = None
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        rules = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or null"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 up to 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "from 0 up to 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 up to 1"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ]
        return out_of_range(self, where, rules)

    def total_steps(self, data: Data) -> int:
        return self.steps or self.epochs * data.steps(self.batch_size)

    def rate_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total − 1."""
        rising = round(self.warmup * total)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, total - rising)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "step":
            return self.learning_rate * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
        return self.learning_rate

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters,
            self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves the network, its convolutions' kernels channels last: on CPU and GPU alike their faster layout."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


class Progress:
    """Where a phase stands, on disk: after a kill the same command goes on from the last saved epoch.

    The file belongs to one set of `settings`; a file of others is ignored. `interval` is the least time
    between two saves, in seconds. Nothing is kept without a path.
    """

    def __init__(self, path: Path | None = None, settings: str = "", interval: float = 60.0) -> None:
        self.path, self.settings, self.interval = path, settings, interval
        self._seconds_before, self._started, self._saved = 0.0, time.monotonic(), time.monotonic()
        self._state = self._read()

    @property
    def stage(self) -> int:
        """Number of the first stage (block, for distillation) that is not finished."""
        return self._state["stage"] if self._state else 0

    @property
    def seconds(self) -> float:
        """Time spent on the phase, earlier processes included."""
        return self._seconds_before + time.monotonic() - self._started

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, stage: int = 0) -> int:
        """Loads the saved state, if it lies in this stage; returns the epoch to go on with."""
        if self._state is None or self._state["stage"] != stage:
            return 0
        model.load_state_dict(self._state["model"])
        if optimizer is not None and self._state["optimizer"] is not None:
            optimizer.load_state_dict(self._state["optimizer"])
        return self._state["epoch"]

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        stage: int,
        epoch: int,
        force: bool = False,
    ) -> None:
        if self.path is None or (not force and time.monotonic() - self._saved < self.interval):
            return
        self._state = {
            "settings": self.settings,
            "stage": stage,
            "epoch": epoch,
            "seconds": self.seconds,
            "model": model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }
        write_atomically(self.path, lambda path: torch.save(self._state, path))
        self._saved = time.monotonic()

    def discard(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file only costs the time to redo the phase
            return None
        if state.get("settings") != self.settings:
            return None
        self._seconds_before = state["seconds"]
        return state


@dataclass(frozen=True)
class Step:
    """What one optimizer step tells: 0-based number, how many there will be, loss, learning rate."""

    number: int
    total: int
    loss: float
    learning_rate: float


def fit(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: Data,
    recipe: Recipe,
    device: torch.device,
    seed: int,
    *,
    stage: int = 0,
    progress: Progress | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Minimises `loss_of(images, labels)` over `parameters`; the caller sets the modes of the modules.

    Everything random in an epoch follows from the seed, the stage and the epoch's number, so that an
    interrupted run ends with the same weights as one that was left alone. Raises TrainingError when the
    loss or the weights stop being finite; no such state is ever saved.
    """
    progress = progress or Progress()
    optimizer = recipe.build(list(parameters))
    total, per_epoch = recipe.total_steps(data), data.steps(recipe.batch_size)
    first = progress.restore(model, optimizer, stage)
    step = first * per_epoch
    remedy = f"lower the learning rate (learning_rate={recipe.learning_rate})"
    for epoch in range(first, math.ceil(total / per_epoch)):
        epoch_seed = (seed * 1009 + stage) * 1013 + epoch
        torch.manual_seed(epoch_seed)
        for images, labels in data.train_batches(recipe.batch_size, seed * 1009 + stage, epoch, device):
            if step == total:
                break
            rate = recipe.rate_at(step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(images, labels)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(f"the loss became {value} at step {step + 1} of {total}; {remedy}")
            loss.backward()
            optimizer.step()
            on_step(Step(step, total, value, rate))
            step += 1
        if not all(bool(torch.isfinite(t).all()) for t in model.state_dict().values()):
            raise TrainingError(f"the weights stopped being finite in epoch {epoch + 1}; {remedy}")
        if step < total:
            progress.save(model, optimizer, stage, epoch + 1)


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, in [0, 1]; `top5` from 100 classes on. `images` were counted, each once."""

    top1: float
    top5: float | None
    images: int

    def to_dict(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "images": self.images}


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, device: torch.device, *, limit: int | None = None, batch_size: int = 250
) -> Accuracy:
    """Accuracy on the test split, or on a fixed random subset of `limit` images; the mode is put back after."""
    was_training = model.training
    model.eval()
    right = right5 = count = 0
    for images, labels in data.test_batches(batch_size, device, limit):
        logits = model(images)
        if logits.ndim != 2 or logits.shape[1] != data.num_classes:
            shape = tuple(logits.shape)
            raise ConfigError([f"the network answers with shape {shape}, but the data has {data.num_classes} classes"])
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        right += int(hits[:, 0].sum())
        right5 += int(hits.sum())
        count += len(labels)
    model.train(was_training)
    return Accuracy(right / count, right5 / count if data.num_classes >= 100 else None, count)
