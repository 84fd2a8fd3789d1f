"""The objects that every phase gets: the data, the device, the seed, the display, and the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tspc.data import Data, Feed
from tspc.system import processes
from tspc.system.tally import Tally
from tspc.terminal.display import Display
from tspc.training import TOP1, Hardware, Metric, Recipe, Step, Task, place


@dataclass(frozen=True)
class Context:
    """`note` receives a dict for each measurement, for `metrics.jsonl`. `metric` judges networks for the `task`.

    The last `reserved` training images judge the finished network alone; nothing is fitted to them.
    """

    data: Data | None
    hardware: Hardware
    seed: int
    display: Display
    note: Callable[[dict[str, Any]], None] = field(default=lambda record: None)
    metric: Metric = TOP1
    task: Task = field(default_factory=Task)
    reserved: int = 0

    @property
    def device(self) -> torch.device:
        return self.hardware.device

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a network to the device, in the layout that it takes."""
        return place(model, self.device, self.hardware.layout)

    @property
    def required_data(self) -> Data:
        assert self.data is not None, "the pipeline loads data for the phases that train"
        return self.data

    def feed(self, recipe: Recipe) -> Feed:
        """How a recipe reads the training split."""
        held_out = min(recipe.held_out, self.required_data.train_size // 10)
        return Feed(recipe.batch_size, self.seed, self.device, held_out, processes.share(), self.reserved)

    def watch(self, phase: str, label: str, total: int, batch_size: int, **where: Any) -> Watch:
        """A progress bar that also notes about fifty steps of the phase, and shows the images per second."""
        return Watch(self, phase, label, total, batch_size, where)

    @contextmanager
    def tally(self, phase: str, label: str = "", total: float = 0) -> Iterator[Tally]:
        """A tally that a progress bar shows, in percent of the work."""
        with self.display.bar(f"{phase:<9} {label}".rstrip(), 100) as bar:
            yield Tally(total, lambda done, of, name: bar.advance(100 * done / of, name))


class Watch:
    """Passes optimizer steps on to the display and, thinned out, to the metrics."""

    def __init__(
        self, context: Context, phase: str, label: str, total: int, batch_size: int, where: dict[str, Any]
    ) -> None:
        self._context, self._phase, self._where = context, phase, where
        self._batch_size, self._first = batch_size, (0, 0.0)
        self._every = max(1, total // 50)
        self._bar = context.display.bar(f"{phase:<9} {label}", total)

    def __enter__(self) -> Callable[[Step], None]:
        self._bar.__enter__()
        return self._on_step

    def __exit__(self, *exception: Any) -> None:
        self._bar.__exit__(*exception)

    def _on_step(self, step: Step) -> None:
        speed = self._images_per_second(step.number)
        self._bar.advance(
            step.number + 1,
            f"loss {step.loss:.4g}" + (f"  {speed:,.0f} {self._context.task.inputs}/s" if speed else ""),
            step.loss,
        )
        if step.number % self._every == 0 or step.number + 1 == step.total:
            record = {"phase": self._phase, "step": step.number + 1, "loss": step.loss}
            more = {"learning_rate": step.learning_rate, "images_per_second": speed}
            self._context.note(record | self._where | {key: value for key, value in more.items() if value})

    def _images_per_second(self, step: int) -> float | None:
        """Images per second after the first step, which includes the warm-up."""
        now = time.monotonic()
        if self._first[1] == 0.0:
            self._first = step, now
        steps, seconds = step - self._first[0], now - self._first[1]
        return round(steps * self._batch_size / seconds, 1) if steps and seconds > 0 else None
