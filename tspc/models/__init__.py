"""Networks by name."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tspc.errors import ConfigError
from tspc.models.cifar_resnet import CIFAR_RESNETS, cifar_resnet
from tspc.models.lazy import give_sizes_
from tspc.models.lenet import LeNet5
from tspc.models.timm_zoo import timm_network
from tspc.models.torchvision_zoo import torchvision_network
from tspc.models.transformers_zoo import OF_CLASSES, class_names, transformers_network, with_fields
from tspc.system.imports import named

__all__ = ["BUILTIN", "FAMILIES", "NetworkSpec", "class_names", "with_fields"]

FAMILIES = ("builtin", "torchvision", "timm", "transformers", "custom")
BUILTIN = (*CIFAR_RESNETS, "lenet5")


@dataclass(frozen=True)
class NetworkSpec:
    """The description of a network, sufficient to build it again.

    `family` is `builtin` (this package's CIFAR ResNets and LeNet-5), `torchvision` (any of its classification
    networks), `timm`, `transformers` or `custom` (`factory` is `package.module:function`, called with `kwargs`).
    `task` is what a network of transformers is for; without it that is a classifier.
    """

    family: str
    name: str
    num_classes: int | None = None
    in_channels: int = 3
    image_size: int | None = None
    factory: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    task: str | None = None

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        if self.task is None:  # files without it are those of earlier versions, which know no such key
            del found["task"]
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NetworkSpec:
        return cls(**data)

    def build(self, pretrained: bool = False, from_file: bool = False) -> nn.Module:
        """The network with initial weights, or with the published ones if `pretrained`.

        A factory decides about the weights itself; its lazy layers get sizes from the size of the images. `from_file`
        says that the description comes from a file of weights; then no folder is read.

        Raises ConfigError for an unknown network or a factory that cannot be called, and WeightsError if published
        weights cannot be loaded.
        """
        if pretrained and self.family == "builtin":
            raise ConfigError(
                [f"pretrained=default: {self.name} has no published weights; pass a file, or null to train it"]
            )
        if self.family == "custom":
            network = _custom(self.factory, self.kwargs)
            give_sizes_(network, self.in_channels, self.image_size)
            return network
        if self.num_classes is None and (self.family != "transformers" or self.task in OF_CLASSES):
            raise ConfigError([f"dataset.num_classes is needed to build {self.name}, as in dataset.num_classes=1000"])
        sizes = self.in_channels, self.image_size
        if self.family == "transformers":
            return transformers_network(
                self.name, self.num_classes, *sizes, pretrained, self.kwargs, not from_file, self.task
            )
        assert self.num_classes is not None
        if self.family == "torchvision":
            return torchvision_network(self.name, self.num_classes, self.in_channels, pretrained, self.kwargs)
        if self.family == "timm":
            return timm_network(self.name, self.num_classes, *sizes, pretrained, self.kwargs)
        if self.name == "lenet5":
            return LeNet5(self.num_classes, self.in_channels, self.image_size or 28)
        if self.name in CIFAR_RESNETS:
            return cifar_resnet(self.name, self.num_classes, self.in_channels)
        near = difflib.get_close_matches(str(self.name), BUILTIN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError([f"model.name={self.name!r} is unknown; built in are {', '.join(BUILTIN)}{hint}"])


def _custom(factory: str | None, kwargs: dict[str, Any]) -> nn.Module:
    build = named(factory, "model.factory")
    try:
        network = build(**kwargs)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError([f"model.factory={factory!r} failed: {type(error).__name__}: {error}"]) from error
    if not isinstance(network, nn.Module):
        raise ConfigError([f"model.factory={factory!r} returned {type(network).__name__}, not a torch.nn.Module"])
    return network
