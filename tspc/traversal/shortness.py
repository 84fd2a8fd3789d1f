"""Whether a network may be run in bfloat16 while its layers are looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.data.model_inputs import Given, called, first_of
from tspc.layers.dense import AXES, DenseLayer, kernel_of, kind_of
from tspc.system.precision import rough
from tspc.traversal.hooks import hooked, running

WORK = 1e11
"""Multiply-adds of one pass over all images from which on the shorter format is worth its error."""
ROWS = 4096
"""About so many of a layer's outputs are compared."""
NOISE = 1e-3
"""The largest share of the rounding in the variance of a layer's outputs."""


@torch.no_grad()
def is_short_enough(model: nn.Module, layers: Collection[str], images: Given, count: int) -> bool:
    """Whether bfloat16 makes passes over `count` images faster, and changes no layer's outputs by more than `NOISE`.

    Judged by a few `images`. The network is in eval mode, and float32 throughout.
    """
    formats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if formats != {torch.float32} or first_of(images).dtype not in (torch.float32, torch.int64, torch.int32):
        return False
    if rough(first_of(images).device) != torch.bfloat16:
        return False
    try:
        exact, work = _outputs(model, layers, images, short=False)
        if work / len(images) * count < WORK:
            return False
        short, _ = _outputs(model, layers, images, short=True)
        return exact.keys() == short.keys() and all(_is_close(exact[name], short[name]) for name in exact)
    except Exception:  # the network may be the user's own
        return False


def _outputs(model: nn.Module, layers: Collection[str], images: Given, short: bool) -> tuple[dict[str, Tensor], float]:
    """The outputs of each layer's last call (rows × T), and the multiply-adds of all calls."""
    found: dict[str, Tensor] = {}
    work = 0.0

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal work
            work += output.numel() * kernel_of(cast(DenseLayer, module))[0].numel()
            channels = -1 - len(AXES.get(kind_of(module) or "", ""))
            rows = output.movedim(channels, -1).flatten(0, -2)
            found[name] = rows[:: max(1, len(rows) // ROWS)].float()

        return see

    with hooked([model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]), running(0, short):
        called(model, images.clone())
    return found, work


def _is_close(exact: Tensor, short: Tensor) -> bool:
    if exact.shape != short.shape or not bool(torch.isfinite(short).all()):
        return False
    # Of the rounding also the mean counts, because constants are fitted to it.
    return bool((exact - short).square().sum() <= NOISE * (exact - exact.mean(0)).square().sum())
