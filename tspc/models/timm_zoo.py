"""Networks of timm, with or without their published weights."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from tspc.errors import ConfigError, WeightsError
from tspc.system import extras


def timm_network(
    name: str, num_classes: int, in_channels: int, image_size: int | None, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    """`timm.create_model(name, …)`. A network that is built for one image size gets the size of the data.

    Raises ConfigError, also if timm is missing, or WeightsError, with the likely remedy.
    """
    extras.require("timm", "model=timm")
    import timm

    names = timm.list_models()
    if name.partition(".")[0] not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names them"
        raise ConfigError([f"model.name={name!r} is not a network of timm; {hint}"])
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels} | kwargs
    if image_size is not None and "img_size" not in given and _is_sized(name):
        given["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=pretrained, **given)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError([f"model.kwargs={kwargs} does not fit timm's {name}: {error}"]) from error
    except Exception as error:  # the hub's client raises a family of its own
        if not pretrained:
            raise
        raise WeightsError(
            f"pretrained=default: cannot download timm's weights of {name} ({type(error).__name__}); "
            "pass pretrained=FILE, or pretrained=random to try without"
        ) from error


def _is_sized(name: str) -> bool:
    """Whether timm's network has position embeddings, or windows, for one size of image."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and config.fixed_input_size)
