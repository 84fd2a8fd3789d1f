"""The inputs on which a network is tried, and those that show the ranges of its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data import Given, ModelInputs
from tspc.deploy import Inputs
from tspc.errors import ConfigError
from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.traversal.hooks import evaluating


@dataclass(frozen=True)
class Example:
    """`tensors` are the arguments of a call, batch first. `source` says what they are, such as "test images"."""

    tensors: Inputs | ModelInputs
    source: str


class InOrder(nn.Module):
    """A network that takes by position, one after the other, the tensors that an example gives it by name."""

    def __init__(self, network: nn.Module, example: ModelInputs) -> None:
        super().__init__()
        self.network, self._example = network, example

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        taken = lambda value: next(given) if isinstance(value, Tensor) else value  # noqa: E731
        positional = [taken(value) for value in self._example.positional]
        named = {name: taken(value) for name, value in self._example.named.items()}
        return self.network(*positional, **named)


def in_order(networks: dict[str, nn.Module], example: Example) -> tuple[dict[str, nn.Module], Inputs]:
    """The networks, and the tensors of the example that they take by position."""
    tensors = example.tensors
    if not isinstance(tensors, ModelInputs):
        return networks, tensors
    return {name: InOrder(network, tensors) for name, network in networks.items()}, tensors_of(tensors)


def tensors_of(batch: Given | Inputs) -> Inputs:
    """The tensors of a batch one after the other, as a network in order takes them."""
    if isinstance(batch, Tensor):
        return (batch,)
    values = batch.values() if isinstance(batch, ModelInputs) else batch
    return tuple(value for value in values if isinstance(value, Tensor))


def for_ranges(count: int, tried: Example, phase: str, context: Context) -> list[Given | Inputs]:
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
        inputs, _ = next(iter(context.data.test_batches(count, device, limit=count)))
        source = f"test {context.task.inputs}"
        return Example(inputs if isinstance(inputs, ModelInputs) else (inputs,), source)
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
