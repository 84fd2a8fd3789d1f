"""Lazy layers, which get their sizes from the first input: they get them here, or an error names them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tspc.errors import ConfigError


def unsized(model: nn.Module) -> list[str]:
    """The names of the layers without sizes."""
    found = [
        name
        for name, module in model.named_modules()
        if any(is_lazy(value) for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    ]
    return [f"{name} ({type(model.get_submodule(name)).__name__})" for name in found]


def require_sizes(model: nn.Module) -> None:
    """Raises ConfigError if layers have no sizes yet; it names them."""
    found = unsized(model)
    if found:
        raise ConfigError([f"layers without sizes yet: {', '.join(found)}; run the network once on an example first"])


@torch.no_grad()
def give_sizes_(model: nn.Module, channels: int, image_size: int | None) -> None:
    """Gives sizes to lazy layers by a run on an image of zeros; does nothing if all have sizes.

    Raises ConfigError if the size of the images is unknown, or the network cannot take them.
    """
    if image_size is None or not unsized(model):
        return require_sizes(model)
    try:
        model.eval()(torch.zeros(1, channels, image_size, image_size))
    except Exception as error:  # the network is the user's own
        given = f"an image of {channels}×{image_size}×{image_size}"
        raise ConfigError([f"the layers without sizes cannot get them from {given}: {error}"]) from error
    model.train()
    return require_sizes(model)
