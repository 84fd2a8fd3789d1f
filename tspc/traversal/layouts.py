"""Whether a network works with images whose channels come last in memory, which is faster on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tspc.data.model_inputs import Given, called, first_of
from tspc.traversal.nested import tensors_in

LIKE = 1e-2
"""A smaller difference of answers, as a share of the largest answer, is rounding."""


@torch.no_grad()
def takes_channels_last(model: nn.Module, images: Given) -> bool:
    """Whether `model` gives the same answer to images (N, C, H, W) with channels last; False for other inputs.

    A network may call `view` on the output of a convolution, which fails then. The network is in eval mode.
    """
    if first_of(images).ndim != 4 or not images.is_floating_point():
        return False
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        plain = called(model, images.contiguous())
        torch.default_generator.manual_seed(0)
        try:
            fast = called(model, images.contiguous(memory_format=torch.channels_last))
            pairs = zip(tensors_in(fast), tensors_in(plain), strict=True)
            return all(alike(one, other) for one, other in pairs)
        except Exception:  # the network may be the user's own
            return False


def alike(first: Any, second: Any) -> bool:
    """Whether two answers differ by rounding alone; True for what is not a tensor of real numbers."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or not first.is_floating_point():
        return True
    if first.shape != second.shape:
        return False
    largest = float(first.abs().max()) if first.numel() else 0.0
    return bool(torch.isclose(first, second, rtol=0.0, atol=LIKE * largest, equal_nan=True).all())
