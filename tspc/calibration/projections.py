"""Random projections of a network's answer, whose gradients show how much the layers matter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tspc.calibration.weights import has_tokens
from tspc.data.answers import answer_of
from tspc.traversal.nested import tensors_in


def direction_of(answer: Tensor, generator: torch.Generator, masks: Sequence[Tensor]) -> Tensor:
    """A random direction in the space of an answer; padded positions have no part in it."""
    direction = torch.randn(answer.shape, generator=generator, dtype=torch.float32, device="cpu").to(answer)
    if answer.ndim == 2 and answer.shape[1] > 1:
        # A constant added to all logits changes no probability.
        direction -= direction.mean(1, keepdim=True)
    elif has_tokens(answer):
        # Nearly all tokens are out of the question. The covariance of this direction is the Fisher information of the
        # logits, diag(p) − ppᵀ. Scaled to length 1 at each position: else those where the network is sure of a token
        # hardly count, but the errors of small ranks change these tokens, too.
        p = answer.detach().float().softmax(2)
        direction = p.sqrt() * direction
        direction -= p * direction.sum(2, keepdim=True)
        direction /= direction.norm(dim=2, keepdim=True) + 1e-6
    mask = next((mask for mask in masks if mask.shape == answer.shape[:2]), None)
    return direction if mask is None else direction * mask.reshape(*mask.shape, *[1] * (answer.ndim - 2)).to(answer)


def with_gradient(answer: Any) -> list[Tensor]:
    """All tensors of a plain list, tuple or dict, such as the maps of a backbone; else the one that counts inside."""
    is_dict = type(answer) in (dict, OrderedDict)
    items = [value for name, value in answer.items() if name != "loss"] if is_dict else answer
    direct = items if type(items) in (list, tuple) else ()
    found = [item for item in direct if isinstance(item, Tensor) and item.grad_fn is not None]
    counting = answer_of(answer)
    if not found and counting is not None and counting.grad_fn is not None:
        return [counting]
    found = found or [tensor for tensor in tensors_in(answer) if tensor.requires_grad][:1]
    if not found:
        raise ValueError("its answer has no tensor with a gradient")
    return found
