"""Checks that the network takes the images of the data set, and gives a value for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tspc.data import Data
from tspc.errors import ConfigError
from tspc.models import NetworkSpec
from tspc.phases.planning import example_input
from tspc.run.config import Config
from tspc.terminal.display import Display
from tspc.training import Trial, tried


def fitted(model: nn.Module, data: Data | None, spec: NetworkSpec, config: Config, display: Display) -> Trial | None:
    """Runs two images through the network, in both memory layouts. If only one layout works, a warning says so.

    Without data the images are random, of the size that the network takes; the result is None if this is not known.
    Raises ConfigError if the network cannot take the images of the data set, or its answer has another shape.
    """
    if data is not None:
        images, _ = next(iter(data.test_batches(2, torch.device("cpu"), limit=2)))
        _check_size(images, config)
    else:
        example = example_input(model, spec)
        if example is None or spec.family in ("builtin", "torchvision"):  # these take any layout
            return None
        images = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    trial = tried(model, images, trains=data is not None and config.trains)
    if trial.reason:
        display.warn(f"{spec.name} runs on contiguous images: channels last would be faster, but then {trial.reason}")
    if data is not None:
        _check_answer(trial, images, data, spec)
    return trial


def _check_size(images: Tensor, config: Config) -> None:
    """Raises ConfigError if the data's images are not as large as the settings say."""
    size = config.dataset.image_size
    if tuple(images.shape[-2:]) != (size, size):
        found = "×".join(map(str, images.shape[-2:]))
        raise ConfigError([f"dataset.image_size={size}, but {config.dataset.name} has images of {found} pixels"])


def _check_answer(trial: Trial, images: Tensor, data: Data, spec: NetworkSpec) -> None:
    shape = getattr(trial.answer, "shape", None)
    if trial.error is not None or shape is None:
        reason = trial.error or f"its answer is {type(trial.answer).__name__}, not one tensor"
        raise ConfigError(
            [f"{spec.name} cannot take the data set's images of shape {tuple(images.shape[1:])}: {reason}"]
        ) from trial.error
    if tuple(shape) != (len(images), data.num_classes):
        raise ConfigError(
            [f"{spec.name} gives {tuple(shape)[1:]} values for an image; the data has {data.num_classes} classes"]
        )
