"""Checks that the network takes the images of the data set, and that its answers can be judged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tspc.data import Data
from tspc.errors import ConfigError
from tspc.models import NetworkSpec
from tspc.phases.planning import example_input
from tspc.run.config import Config
from tspc.run.suiting import suited
from tspc.terminal.display import Display
from tspc.training import TOP1, Metric, Trial, measure, tried

CPU = torch.device("cpu")


def fitted(
    model: nn.Module, data: Data | None, spec: NetworkSpec, config: Config, metric: Metric, display: Display
) -> Trial | None:
    """Runs two images through the network, in both memory layouts. If only one layout works, a warning says so.

    Without data the images are random, of the size that the network takes; the result is None if this is not known.
    The metric judges the answers to them. Raises ConfigError if the network cannot take the images of the data set, if
    its answer has a shape that the metric or the training does not take, or if the user's metric fails.
    """
    if data is not None and not config.task.is_of_images:
        return suited(model, data, spec, config, metric)
    labels = None
    if data is not None:
        images, labels = next(iter(data.test_batches(2, CPU, limit=2)))
        _check_size(images, config)
    else:
        example = example_input(model, spec)
        if example is None or spec.family in ("builtin", "torchvision"):  # these take any layout
            return None
        images = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    trial = tried(model, images, trains=data is not None and config.trains)
    if trial.reason:
        display.warn(f"{spec.name} runs on contiguous images: channels last would be faster, but then {trial.reason}")
    if data is not None and labels is not None:
        _check_answer(trial, images, data, spec, needs_classes=_needs_classes(config, metric))
        _try_metric(metric, model, images.contiguous(memory_format=trial.layout), labels, data)
    return trial


def _try_metric(metric: Metric, model: nn.Module, images: Tensor, labels: Tensor, data: Data) -> None:
    """Raises what is wrong with the metric, before any work. The random state does not change."""
    if metric.name != TOP1.name:  # of which the shape of the answer tells all
        with torch.random.fork_rng(devices=[]):
            measure(metric, model, [(images, labels)], CPU, model, num_classes=data.num_classes)


def _needs_classes(config: Config, metric: Metric) -> bool:
    """Whether the metric or a training compares answers with labels, so that there must be a value for each class."""
    trains_on_labels = config.pretrained is None or "finetune" in config.phases
    return trains_on_labels or metric.name in ("top1", "top5", "perplexity")


def _check_size(images: Tensor, config: Config) -> None:
    """Raises ConfigError if the data's images are not as large as the settings say."""
    size = getattr(config.dataset, "image_size", None)
    if tuple(images.shape[-2:]) != (size, size):
        found = "×".join(map(str, images.shape[-2:]))
        raise ConfigError([f"dataset.image_size={size}, but {config.dataset.name} has images of {found} pixels"])


def _check_answer(trial: Trial, images: Tensor, data: Data, spec: NetworkSpec, needs_classes: bool) -> None:
    """Raises ConfigError if the network fails, or where an answer `needs_classes` and is something else."""
    shape = tuple(getattr(trial.answer, "shape", ()))
    if trial.error is not None or (needs_classes and not shape):
        reason = trial.error or f"its answer is {type(trial.answer).__name__}, not one tensor"
        raise ConfigError(
            [f"{spec.name} cannot take the data set's images of shape {tuple(images.shape[1:])}: {reason}"]
        ) from trial.error
    if needs_classes and shape != (len(images), data.num_classes):
        raise ConfigError(
            [f"{spec.name} gives {shape[1:]} values for an image; the data has {data.num_classes} classes"]
        )
