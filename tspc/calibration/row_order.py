"""In which order a layer has the rows of a batch: input by input, position by position, or as the network chooses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data.model_inputs import ModelInputs, called
from tspc.system.modes import whole_operations
from tspc.traversal.hooks import evaluating, hooked

BY_INPUT, BY_POSITION, MIXED = "by input", "by position", "mixed"
TOLERANCE = 1e-4
"""Rows that differ by less, relative to the largest number, are the same."""


@torch.no_grad()
def row_orders(model: nn.Module, names: Collection[str], batch: ModelInputs) -> dict[str, str]:
    """For each of the named layers that is called, how its output rows (all axes but the last) are arranged.

    Networks work on (N, L, C), on (L, N, C), or on N·L rows in one of both orders, which the shapes do not tell. Two
    inputs a, b of the batch show it: if b is replaced by a, the rows of b alone change. A layer whose rows do not
    change is taken for one that goes input by input. The batch has at least two inputs; if all are the same, nothing
    is known, and all orders are taken for mixed.
    """
    differing = (place for place in range(1, len(batch)) if _differ(batch, place))
    if (place := next(differing, None)) is None:
        return dict.fromkeys(names, MIXED)
    with whole_operations(), evaluating(model), torch.random.fork_rng(devices=[]):
        one, other = (_outputs(model, names, batch[torch.tensor(rows)]) for rows in ([0, place], [0, 0]))
    return {name: _order(rows, other[name]) for name, rows in one.items() if name in other}


def _differ(batch: ModelInputs, place: int) -> bool:
    """Whether an input of the batch differs from the first one."""
    pairs = zip(batch[:1].values(), batch[place : place + 1].values(), strict=True)
    return any(isinstance(one, Tensor) and not torch.equal(one, other) for one, other in pairs)


def _outputs(model: nn.Module, names: Collection[str], batch: ModelInputs) -> dict[str, Tensor]:
    """The output rows of each layer's first call."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1:
                found.setdefault(name, output.flatten(0, -2).float())

        return see

    with hooked([model.get_submodule(name).register_forward_hook(hook(name)) for name in names]):
        called(model, batch)
    return found


def _order(rows: Tensor, others: Tensor) -> str:
    if rows.shape != others.shape or len(rows) % 2:
        return MIXED
    changed = (rows - others).abs().amax(1) > TOLERANCE * rows.abs().max()
    by_input, by_position = not bool(changed[: len(rows) // 2].any()), not bool(changed[::2].any())
    if by_input and by_position:  # nothing changed in the first half of the positions, as with texts padded in front
        return BY_INPUT if int(changed.sum()) < 2 else BY_POSITION
    return BY_INPUT if by_input else BY_POSITION if by_position else MIXED


def arranged_masks(masks: list[Tensor], order: str) -> list[Tensor]:
    """The masks (N, L) of a batch in the order of a layer's rows; none where the network chooses the order."""
    if order == MIXED:
        return []
    return [mask.mT for mask in masks] if order == BY_POSITION else masks
