"""The optimisation loop that every training phase shares."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tspc.data import Batch, Data, Feed, generator_of
from tspc.errors import TrainingError
from tspc.store.state import tensor_state
from tspc.system import interrupts, processes
from tspc.training.progress import Progress
from tspc.training.recipe import Recipe

EVERY = 10
"""On an accelerator the loss is read only after this number of steps, because each read waits for the device. The loss
is averaged over this number of steps before the loop checks whether it still falls."""

LossOf = Callable[[nn.Module, Any, Tensor], Tensor]
"""The loss of the network on inputs and targets: a mean over the batch."""


class Batches(Protocol):
    """The training data: `per_epoch` batches in a pass. Any batch can be read without the ones before it."""

    per_epoch: int

    def read(self, epoch: int, start: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs (a tensor, unless the loss takes others) and targets of this process, on the device.

        They begin with the batch number `start` of the pass.
        """
        ...


class Labelled:
    """Augmented training images with their labels."""

    def __init__(self, data: Data, feed: Feed) -> None:
        self._data, self._feed = data, feed
        self.per_epoch = data.steps(feed)

    def read(self, epoch: int, start: int) -> Iterator[Batch]:
        return self._data.train_batches(self._feed, epoch, start)


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 0, the number of all steps, loss, learning rate."""

    number: int
    total: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Hardware:
    """`precision` is the dtype of autocast (None: float32 throughout); `compile` runs through torch.compile.

    `layout` is the memory format of images and of the kernels of convolutions.
    """

    device: torch.device
    precision: torch.dtype | None = None
    compile: bool = False
    layout: torch.memory_format = torch.channels_last

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"


@dataclass
class Watchers:
    """Functions that the loop calls. `judge` scores the network (higher is better).

    `enough` may end a part early. It gets the losses so far, each the mean of ten steps.
    """

    on_step: Callable[[Step], None] = field(default=lambda step: None)
    judge: Callable[[nn.Module], float] | None = None
    enough: Callable[[list[float]], bool] = field(default=lambda losses: False)


def fit(
    network: nn.Module,
    batches: Batches,
    loss_of: LossOf,
    recipe: Recipe,
    hardware: Hardware,
    seed: int,
    *,
    part: int = 0,
    progress: Progress | None = None,
    watchers: Watchers | None = None,
    kept: nn.Module | None = None,
) -> None:
    """Minimises `loss_of` over the parameters of `network` that require a gradient, in place.

    The caller sets the modes of the modules. Everything random in a step follows from the seed, the part and the
    number of the step, so an interrupted run ends with the same weights as one without a stop. With a judge the result
    is the best of its evaluations. `kept` is the module in the saved states, if it is more than `network`.

    Raises TrainingError when the loss or the weights are no longer finite (such a state is never saved), and
    Interrupted after a signal.
    """
    loop = _Loop(network, batches, loss_of, recipe, hardware, seed, part)
    loop.follow(progress or Progress(), watchers or Watchers(), kept or network)
    loop.run()


class _Loop:
    def __init__(
        self,
        network: nn.Module,
        batches: Batches,
        loss_of: LossOf,
        recipe: Recipe,
        hardware: Hardware,
        seed: int,
        part: int,
    ) -> None:
        self.network, self.batches, self.loss_of, self.recipe = network, batches, loss_of, recipe
        self.hardware, self.seed, self.part = hardware, seed, part
        self.total = recipe.total_steps(batches.per_epoch)
        self.optimizer = recipe.build(network)
        # The loss of float16 is scaled, so that small gradients do not vanish.
        self.scaler = torch.GradScaler(hardware.device.type, enabled=hardware.precision == torch.float16)
        self.averaged = None
        if recipe.average:
            self.averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average), use_buffers=True)
        self.best: dict[str, Any] | None = None
        self.step, self.is_over = 0, False
        self.losses: list[float] = []
        self.recent = torch.zeros((), dtype=torch.float32, device=hardware.device)

    def follow(self, progress: Progress, watchers: Watchers, kept: nn.Module) -> None:
        """Goes on from the saved state, if there is one."""
        self.progress, self.watchers, self.kept = progress, watchers, kept
        state = progress.state_of(self.part)
        if state is not None and "step" in state:
            with progress.restoring():
                self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.is_over = state["step"], state["best"], state["is_over"]
        self.losses, self.recent = state["losses"], state["recent"].to(self.hardware.device)
        self.recipe = replace(self.recipe, learning_rate=state["learning_rate"])  # may be measured
        self.kept.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])

    def run(self) -> None:
        """Runs all steps that are left, then loads the result into the network."""
        with interrupts.deferred(), processes.synchronised(self.network):
            trained = processes.together(self.network)
            if self.hardware.compile:
                trained = cast(nn.Module, torch.compile(trained))
            for inputs, targets in self._left():
                self._judge_if_due()
                self._one(trained, inputs, targets)
                self.step += 1
                if self.step % EVERY == 0:
                    self.is_over = self.watchers.enough(self.losses)
                self._save_if_due()
        self.optimizer.zero_grad(set_to_none=True)
        self._check_weights()
        if self.averaged is not None:
            self.network.load_state_dict(self.averaged.module.state_dict())
        if self.watchers.judge is not None:
            self._judge()
            assert self.best is not None
            self.network.load_state_dict(self.best["network"])

    def _left(self) -> Iterator[tuple[Any, Tensor]]:
        while self.step < self.total and not self.is_over:
            epoch, start = divmod(self.step, self.batches.per_epoch)
            for batch in self.batches.read(epoch, start):
                yield batch
                if self.step == self.total or self.is_over:
                    return

    def _one(self, trained: nn.Module, inputs: Any, targets: Tensor) -> None:
        """One optimizer step."""
        numbers = (self.seed, self.part, self.step, processes.rank())
        torch.manual_seed(generator_of(*numbers).initial_seed())
        rate = self.recipe.rate_at(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float32, device=targets.device)
        for some, wanted in self._parts(inputs, targets):
            with torch.autocast(targets.device.type, self.hardware.precision, self.hardware.precision is not None):
                part = self.loss_of(trained, some, wanted) * (len(wanted) / len(targets))
            self.scaler.scale(part).backward()
            loss += part.detach()
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        self._tell(loss, rate)

    def _parts(self, inputs: Any, targets: Tensor) -> list[tuple[Any, Tensor]]:
        count = self.recipe.accumulate
        return [(inputs, targets)] if count == 1 else list(zip(inputs.chunk(count), targets.chunk(count), strict=True))

    def _tell(self, loss: Tensor, rate: float) -> None:
        """Reports the loss, but only as often as needed on an accelerator, which waits for each report."""
        self.recent += loss
        is_mark = (self.step + 1) % EVERY == 0
        if not self.hardware.is_cpu and not is_mark and self.step + 1 < self.total:
            return
        value = float(processes.summed(loss)) / processes.count()
        if not math.isfinite(value):
            raise TrainingError(f"the loss became {value} at step {self.step + 1} of {self.total}; {self._remedy}")
        if is_mark:
            self.losses.append(float(processes.summed(self.recent)) / processes.count() / EVERY)
            self.recent = torch.zeros_like(self.recent)
        self.watchers.on_step(Step(self.step, self.total, value, rate))

    @property
    def _remedy(self) -> str:
        if self.step == 0:  # no step was taken yet
            return "this happens before any training: look at the network's weights and at the data" + self._precision
        return (
            f"lower the learning rate (learning_rate={self.recipe.learning_rate:g} in this training)" + self._precision
        )

    @property
    def _precision(self) -> str:
        is_narrow = self.hardware.precision == torch.float16
        return ", or train with precision=bfloat16 or float32, whose range is wider" if is_narrow else ""

    def _check_weights(self) -> None:
        if not all(bool(torch.isfinite(t).all()) for t in tensor_state(self.network).values()):
            raise TrainingError(f"the weights are no longer finite before step {self.step + 1}; {self._remedy}")

    def _judge_if_due(self) -> None:
        """Judges before the first step, then at equal distances, and after the last step."""
        passed = self.step * self.recipe.evaluations
        is_due = passed // self.total > (passed - self.recipe.evaluations) // self.total
        if self.watchers.judge is not None and is_due and self.step < self.total:
            self._judge()

    def _judge(self) -> None:
        assert self.watchers.judge is not None
        judged = self.network if self.averaged is None or self.step == 0 else self.averaged.module
        if self.best is not None and self.best["step"] == self.step:
            return  # after a restart
        score = self.watchers.judge(judged)
        if self.best is None or score > self.best["score"]:
            self.best = {"step": self.step, "score": score, "network": copy.deepcopy(judged.state_dict())}

    def _save_if_due(self) -> None:
        stop = self._stopped()
        if stop or (self.step < self.total and self.progress.is_due):
            self._check_weights()
            self.progress.save(self.part, self._state())
        if stop:
            raise interrupts.interruption(f"after step {self.step} of {self.total}")

    def _stopped(self) -> bool:
        """Whether a signal came to any process. All processes check together, so that none waits for the others."""
        if processes.count() == 1:
            return interrupts.received()
        if self.step % EVERY and self.step < self.total and not self.is_over:
            return False
        flag = torch.tensor(float(interrupts.received()), device=self.hardware.device)
        return float(processes.summed(flag)) > 0

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "is_over": self.is_over,
            "learning_rate": self.recipe.learning_rate,
            "losses": self.losses,
            "recent": self.recent,
            "network": self.kept.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "best": self.best,
        }
