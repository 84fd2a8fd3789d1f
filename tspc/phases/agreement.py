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
    """Blocks that are all closer can still be further together, where little of the network is left."""
    trained = copy.deepcopy(model.state_dict())
    after, _ = _agreement(model, reference, images)
    model.load_state_dict(start)
    before, count = _agreement(model, reference, images)
    # The difference of two shares of so many images, at two standard deviations.
    chance = 2 * math.sqrt((before * (1 - before) + after * (1 - after)) / count)
    if before - after <= chance:
        model.load_state_dict(trained)
        return
    shares = f"{100 * before:.1f} % of the judging images, after it on {100 * after:.1f} %"
    context.display.line(f"distill    undone: before it the network agreed with the reference on {shares}")


def _agreement(model: nn.Module, reference: nn.Module, images: list[Tensor]) -> tuple[float, float]:
    """The share of the images to which both give the same class (1 if they are no classifiers), and how many there are.

    Of all processes.
    """
    same = torch.zeros(2, device=images[0].device)
    with evaluating(model):
        for batch in images:
            ours, theirs = model(batch), reference(batch)
            if not (isinstance(theirs, Tensor) and theirs.ndim == 2):
                return 1.0, 1.0
            same += torch.tensor([float((ours.argmax(1) == theirs.argmax(1)).sum()), len(batch)]).to(same)
    agreed, count = processes.summed(same).tolist()
    return agreed / count, count
