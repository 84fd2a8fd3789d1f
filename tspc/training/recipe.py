"""The settings of the optimisation: learning rates, optimizer, clipping, averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from tspc.system.bounds import COUNT, NONE_OR_MORE, SHARE_BELOW_ONE, Bounds, out_of_range

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine", "step")


@dataclass(frozen=True)
class Recipe:
    """The settings of the optimisation. `steps` (optimizer steps) replaces `epochs` (passes over the data), if given.

    A step takes `batch_size` images, all processes together, in `accumulate` parts one after the other. SGD uses
    Nesterov's momentum if `momentum` is above 0. Weight decay does not apply to vectors (biases, batch norms). `warmup`
    is the share of all steps in which the learning rate rises linearly from zero. The `step` schedule divides the rate
    by ten after half and after three quarters of the other steps. Gradients are clipped to the norm `clip`, if above 0.
    With `average` above 0 the result is the exponential moving average of the weights with that decay.

    With `held_out` above 0 this number of training images (at most a tenth) is never trained on. They judge the network
    before the first step and `evaluations` times after it, and the result is the best state.
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
    clip: float = 0.0
    accumulate: int = 1
    average: float = 0.0
    held_out: int = 0
    evaluations: int = 5

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        allowed = {
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "epochs": COUNT,
            "batch_size": COUNT,
            "steps": COUNT,
            "learning_rate": Bounds(0, 1e6, above=True),
            "momentum": SHARE_BELOW_ONE,
            "weight_decay": Bounds(0, 1e3),
            "warmup": SHARE_BELOW_ONE,
            "label_smoothing": SHARE_BELOW_ONE,
            "clip": Bounds(0, 1e12),
            "accumulate": COUNT,
            "average": SHARE_BELOW_ONE,
            "held_out": NONE_OR_MORE,
            "evaluations": COUNT,
        }
        return out_of_range(self, where, allowed)

    def total_steps(self, per_epoch: int) -> int:
        return self.steps or self.epochs * per_epoch

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

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the parameters that require a gradient."""
        trained = [p for p in network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "adam":
            return torch.optim.AdamW(groups, self.learning_rate)
        return torch.optim.SGD(groups, self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0)
