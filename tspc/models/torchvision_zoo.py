"""torchvision's classification networks, with or without their published weights."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from tspc.errors import ConfigError, WeightsError

WITH_AUXILIARY = ("googlenet", "inception_v3")
"""Networks with auxiliary classifiers. These help early training only, so they are left out."""


def torchvision_network(
    name: str, num_classes: int, in_channels: int, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    """`torchvision.models.<name>`. Raises ConfigError or WeightsError with the likely remedy."""
    from torchvision import models  # takes a second

    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names)}"
        raise ConfigError([f"model.name={name!r} is not a torchvision classification network; {hint}"])
    if in_channels != 3:
        raise ConfigError(
            [f"{name} takes images of 3 channels, the data set has {in_channels}; dataset.channels=3 repeats grey"]
        )
    if pretrained:
        return _published(name, num_classes, kwargs)
    if name in WITH_AUXILIARY:
        kwargs = {"aux_logits": False, "init_weights": True} | kwargs
    try:
        return models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"model.kwargs={kwargs} does not fit torchvision's {name}: {error}"]) from error


def _published(name: str, num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    from torchvision import models

    weights = models.get_model_weights(name)["DEFAULT"]
    classes = len(weights.meta["categories"])
    if num_classes != classes:
        raise ConfigError(
            [f"pretrained=default: {name}'s published weights tell {classes} classes, the data set has {num_classes}"]
        )
    try:
        model = models.get_model(name, weights=weights, **kwargs)
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"pretrained=default: cannot download {weights.url} ({error}); download it elsewhere and put it into "
            f"{folder}, or pass pretrained=FILE, or pretrained=random to try without"
        ) from error
    if name in WITH_AUXILIARY:
        for name, value in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
            if hasattr(model, name):
                setattr(model, name, value)
    return model
