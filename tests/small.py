"""A small network, small data and a recipe for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tspc.data import DataSpec, load_data
from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.phases.finetune import train_classifier
from tspc.terminal.display import Display
from tspc.training import Hardware, Progress, Recipe

CPU = torch.device("cpu")
SPEC = DataSpec("synthetic", "s", 10, 3, 16, (0.5,), (0.25,), options={"train": 200, "test": 130})


def network() -> nn.Module:
    torch.manual_seed(0)
    return NetworkSpec("builtin", "resnet8", 10).build()


def cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"epochs": 2, "batch_size": 50, "learning_rate": 0.05} | changes)


def context_of() -> Context:
    """What a phase is given; `records` has what it notes."""
    records: list[dict[str, Any]] = []
    made = Context(load_data(SPEC), Hardware(CPU), 0, Display(), records.append)
    object.__setattr__(made, "records", records)
    return made


def save_trained(folder: Path) -> None:
    model = network()
    train_classifier(model, recipe(epochs=4), context_of(), Progress(), "pretrain")
    save_file(model.state_dict(), folder / "model.safetensors")
