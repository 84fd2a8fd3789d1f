"""A small network, small data and a recipe for the tests of training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspc.data import DataSpec
from tspc.models import NetworkSpec
from tspc.training import Recipe

CPU = torch.device("cpu")
SPEC = DataSpec("synthetic", "s", 10, 3, 16, (0.5,), (0.25,), options={"train": 200, "test": 130})


def network() -> nn.Module:
    torch.manual_seed(0)
    return NetworkSpec("builtin", "resnet8", 10).build()


def cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"epochs": 2, "batch_size": 50, "learning_rate": 0.05} | changes)
