"""The inputs on which a network is tried, and those that show the ranges of its activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tspc.data.arranging import as_positional
from tspc.deploy import Inputs
from tspc.errors import ConfigError
from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.traversal.hooks import evaluating


@dataclass(frozen=True)
class Example:
    """`tensors` are the arguments of a call, batch first. `source` says what they are, such as "test images"."""

    tensors: Inputs
    source: str


def for_ranges(count: int, tried: Example, phase: str, context: Context) -> list[Tensor | Inputs]:
    """Batches of `count` training images on the CPU, which show the ranges of activations in int8.

    Without data these are the inputs of the example, and a warning says so. `phase` is the one that asks.
    """
    if context.data is not None:
        return list(context.data.calibration_batches(count, 32, torch.device("cpu")))
    text = f"there is no data, so {tried.source} show the ranges of activations in int8; name a data set"
    context.display.warn(f"{phase:<9}  {text}")
    return [tried.tensors]


def example(model: nn.Module, spec: NetworkSpec, count: int, context: Context) -> Example:
    """Test images. Without data: random images, or the example inputs that a network of transformers provides.

    Raises ConfigError if the network cannot take them.
    """
    device = context.device
    if context.data is not None:
        images, _ = next(iter(context.data.test_batches(count, device, limit=count)))
        return Example(as_positional(model, images), "test images")
    own = getattr(model, "dummy_inputs", None)
    if spec.family == "transformers" and own and "input_ids" in own:
        return Example((own["input_ids"].to(device),), "token numbers")
    size = spec.image_size or 224
    generator = torch.Generator().manual_seed(context.seed)
    images = torch.randn(count, spec.in_channels, size, size, generator=generator).to(device)
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    except Exception as error:  # the network may be the user's own
        raise ConfigError(
            [
                f"{spec.name} cannot take random images of shape {tuple(images.shape[1:])}: {error}; "
                "set dataset.channels and dataset.image_size, or from Python call tspc.export(model, path, inputs)"
            ]
        ) from error
    return Example((images,), "random images")
