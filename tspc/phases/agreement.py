"""Whether training the blocks has served the network, by how often it gives the reference's class."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from tspc import processes
from tspc.hooks import evaluating
from tspc.phases.context import Context


@torch.no_grad()
def keep_better_(
    model: nn.Module, start: dict[str, Tensor], reference: nn.Module, images: list[Tensor], context: Context
) -> None:
    """Blocks that are all closer can still be further together, where little of the network is left.

    The network is set back to `start` if it gave the reference's class on more of the images then, by more than two
    standard deviations of that difference (McNemar, 1947). What does not classify stays as it is.
    """
    trained = copy.deepcopy(model.state_dict())
    after = _agreeing(model, reference, images)
    model.load_state_dict(start)
    before = _agreeing(model, reference, images)
    lost, gained = before & ~after, after & ~before
    counts = torch.stack([flags.sum() for flags in (lost, gained, before, after, torch.ones_like(after))])
    lost, gained, before, after, images_in_all = processes.summed(counts).tolist()
    if lost - gained <= 2 * math.sqrt(lost + gained):
        model.load_state_dict(trained)
        return
    text = f"before it the network gave the reference's class on {before:,} of {images_in_all:,} training images"
    context.display.line(f"distill    undone: {text}, after it on {after:,}")


def _agreeing(model: nn.Module, reference: nn.Module, images: list[Tensor]) -> Tensor:
    """For each image whether both answer with the same class; true for all where they do not classify."""
    with evaluating(model):
        pairs = [(model(batch), reference(batch)) for batch in images]
    if not all(isinstance(theirs, Tensor) and theirs.ndim == 2 for _, theirs in pairs):
        return torch.ones(1, dtype=torch.bool, device=images[0].device)
    return torch.cat([ours.argmax(1) == theirs.argmax(1) for ours, theirs in pairs])
