"""Accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tspc.data import Batch, Data
from tspc.errors import ConfigError
from tspc.system import processes
from tspc.system.modes import own_modes
from tspc.traversal.hooks import evaluating


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
    batches = data.test_batches(batch_size, device, limit, processes.share())
    return accuracy(model, batches, data.num_classes, device)


@own_modes(exact=False)
@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch], num_classes: int, device: torch.device) -> Accuracy:
    """Accuracy over the batches of this process and of all others."""
    # Right, right among five, all: whole numbers, exact up to 16 million.
    counts = torch.zeros(3, dtype=torch.float32, device=device)
    with evaluating(model):
        for images, labels in batches:
            logits = model(images)
            if logits.ndim != 2 or logits.shape[1] != num_classes:
                shape = tuple(logits.shape)
                raise ConfigError([f"the network answers with shape {shape}, but the data has {num_classes} classes"])
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            counts += torch.stack((hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum())).to(counts)
    right, right5, count = processes.summed(counts).tolist()
    return Accuracy(right / count, right5 / count if num_classes >= 100 else None, int(count))
