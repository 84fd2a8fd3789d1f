"""Which arguments say where a batch is padded, and in which of the two ways: some are true at text, some at padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tspc.errors import TspcWarning

MASKS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask", "input_mask", "padding_mask", "mask")
"""Names of arguments that say which positions hold something: 1 or true there, 0 or false at padded ones."""
INVERTED = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
"""Names of arguments that are true at padded positions, as in PyTorch's own attention."""


def is_mask(name: str) -> bool:
    """Whether an argument of this name says which positions are padded."""
    return name in (*MASKS, *INVERTED) or ("mask" in name and "pad" in name)


def filled_positions(name: str, mask: Tensor, inputs: Iterable[Any]) -> Tensor:
    """Where the mask (N, L) of this name says that a position holds something; `inputs` are the other arguments.

    Some networks have a `mask` or a `padding_mask` that is true at padded positions. Texts are padded at one end and
    none is empty, so the mask itself mostly shows what it means; else the padded positions are those that hold one
    value. If nothing shows it the name counts, and a warning says how the mask was read.
    """
    # Masks of floating-point numbers may be added to the scores of an attention: 0, and -inf at padded positions.
    if mask.is_floating_point() and (name in INVERTED or bool((mask < 0).any())):
        return mask >= 0
    true = mask != 0
    if name in INVERTED or mask.numel() == 0:
        return ~true
    as_text, as_padding = _is_at_one_end(true), _is_at_one_end(~true) and _is_whole(~true)
    if not as_text and not as_padding:
        return true  # positions in between are left out, or a text is empty
    if as_text and as_padding:
        own = next((x for x in inputs if isinstance(x, Tensor) and x.ndim > 1 and x.shape[:2] == mask.shape), mask)
        as_text, as_padding = _is_of_one_value(own, ~true), _is_of_one_value(own, true)
    if as_text != as_padding:
        return true if as_text else ~true
    if "attention_mask" in name:
        return true
    # Boolean masks of this name are mostly PyTorch's.
    is_inverted = "pad" in name and mask.dtype == torch.bool
    ways = ("padding", "attention_mask") if is_inverted else ("text", "key_padding_mask")
    message = (
        f"the inputs do not show whether {name} is true at text or at padding; it is read as true at {ways[0]}. "
        f"If it is the other way, call the argument of forward {ways[1]}"
    )
    warnings.warn(message, TspcWarning, stacklevel=2)
    return ~true if is_inverted else true


def _is_at_one_end(filled: Tensor) -> bool:
    """Whether no text would be empty, and all begin at the first position or all end at the last."""
    return bool(filled[:, 0].all()) or bool(filled[:, -1].all())


def _is_whole(filled: Tensor) -> bool:
    """Whether each row is a text and then padding, or each is padding and then a text."""
    steps = filled.long().diff(dim=1)
    return bool((steps <= 0).all() or (steps >= 0).all())


def _is_of_one_value(inputs: Tensor, places: Tensor) -> bool:
    """Whether the inputs (N, L, …) are the same number, or the same vector, at all these places (N, L)."""
    values = inputs[places.to(inputs.device)]
    return bool((values == values[:1]).all())


def is_shared(name: str, value: Any, first: Tensor) -> bool:
    """Whether an argument is one table for all inputs although it has as many rows as there are inputs `first`.

    Such are the mask of a causal attention (L, L) and the numbers of positions (L), where L is also the number of
    inputs.
    """
    count = len(first)
    if not name and isinstance(value, Tensor) and (value.dtype == torch.bool or bool(value.isinf().any())):
        name = "mask"  # by position
    if not isinstance(value, Tensor) or count < 2 or value.ndim not in (1, 2) or len(value) != count:
        return False
    if value.ndim == 1:
        is_whole = not value.is_floating_point() and value.dtype != torch.bool
        is_of_positions = is_whole and "position" in name and first.ndim > 1 and first.shape[1] == count
        return is_of_positions and bool((value.diff() == 1).all())
    is_of_attention = "mask" in name and "attention_mask" not in name and "pad" not in name
    if value.shape[1] != count or not is_of_attention:
        return False
    # Equal along each diagonal, and another value right above or right below the main one: triangles and bands. A mask
    # of padding is so only if the texts have the lengths 1, 2, 3, … in this order.
    own, above, below = (value.diagonal(k) for k in (0, 1, -1))
    is_banded = bool((value[1:, 1:] == value[:-1, :-1]).all())
    return is_banded and (bool((above != own[0]).any()) or bool((below != own[0]).any()))
