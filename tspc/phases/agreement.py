"""Whether training the blocks has served the network, by how often it gives the reference's class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tspc import processes
from tspc.hooks import evaluating
from tspc.phases.context import Context

Images = Callable[[], Iterable[Tensor]]


@torch.no_grad()
def keep_better_(
    model: nn.Module, start: dict[str, Tensor], reference: nn.Module, images: Images, context: Context
) -> None:
    """Blocks that are all closer can still be further together, where little of the network is left.

    The network is set back to `start` if it gave the reference's class on more of the images then, by more than two
    standard deviations of that difference (McNemar, 1947). What does not classify stays as it is.
    """
    wanted = _classes(reference, images)
    if wanted is None:
        return
    trained = copy.deepcopy(model.state_dict())
    after = _classes(model, images) == wanted
    model.load_state_dict(start)
    before = _classes(model, images) == wanted
    lost, gained = before & ~after, after & ~before
    counts = torch.stack([flags.sum() for flags in (lost, gained, before, after, torch.ones_like(after))])
    lost, gained, before, after, count = processes.summed(counts).tolist()
    if lost - gained <= 2 * math.sqrt(lost + gained):
        model.load_state_dict(trained)
        return
    context.note({"phase": "distill", "event": "undone", "before": before, "after": after, "images": count})
    text = f"before it the network gave the reference's class on {before:,} of {count:,} training images"
    context.display.line(f"distill    undone: {text}, after it on {after:,}")


def _classes(network: nn.Module, images: Images) -> Tensor | None:
    """The class of each image; None if the network does not classify."""
    found: list[Tensor] = []
    with evaluating(network):
        for batch in images():
            answer = network(batch)
            if not (isinstance(answer, Tensor) and answer.ndim == 2):
                return None
            found.append(answer.argmax(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=next(network.parameters()).device)
