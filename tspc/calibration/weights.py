"""How much each position of a text matters to the network's answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from tspc.calibration.patches import Positions
from tspc.calibration.row_order import BY_INPUT

EVEN = 0.1
"""The share of all weights that every position has alike: a layer needs inputs of more than a few positions."""
VOCABULARY = 8192
"""An answer with so many numbers at each position holds the logits of a language model's tokens."""


def has_tokens(answer: Tensor | None) -> bool:
    """Whether a network's answer has the logits of tokens (N × L × vocabulary)."""
    return answer is not None and answer.ndim == 3 and answer.shape[2] >= VOCABULARY


class RowWeights:
    """The sizes ‖g‖ of the gradients g that come to the output rows of each layer, over all batches of the samples.

    A word of a short sentence, or the token that the answer is read from, matters more than others. The moments of a
    layer's inputs give a row the weight ‖g‖ ÷ its mean. K-FAC takes inputs and gradients as independent; the weight is
    a part of what links them. Its square would fit E‖g‖²xxᵀ, but then few rows decide, and networks were worse.
    """

    def __init__(self) -> None:
        self._squares: dict[str, dict[tuple[int, int], list[Tensor]]] = {}
        self._known: dict[str, list[Tensor]] = {}

    def start(self, layers: Collection[str]) -> None:
        """Forgets what was found for these layers, whose gradients come next."""
        for name in layers:
            self._squares.pop(name, None)

    def add(self, name: str, batch: int, part: int, rows: Tensor) -> None:
        """Adds gradients of a layer's outputs (positions × T), of a part of a batch."""
        squares = rows.float().square().sum(1).cpu()
        self._squares.setdefault(name, {}).setdefault((batch, part), []).append(squares)

    def finish(self, layers: Collection[str], probes: int, orders: Mapping[str, str]) -> None:
        """Makes the weights. A layer that is called several times in a pass has none: its rows cannot be told apart.

        Neither has one that does not go input by input (see `row_order`), if a batch was divided.
        """
        for name in layers:
            found = self._squares.pop(name, {})
            is_divided = len({batch for batch, _ in found}) < len(found)
            is_mixed = is_divided and orders.get(name, BY_INPUT) != BY_INPUT
            if not found or is_mixed or any(len(each) != probes for each in found.values()):
                continue
            batches: dict[int, list[Tensor]] = {}
            for (batch, _), each in sorted(found.items()):
                batches.setdefault(batch, []).append(torch.stack(each).sum(0).sqrt())
            whole = [torch.cat(parts) for parts in batches.values()]
            counted = torch.cat(whole)
            mean = counted[counted > 0].mean()
            if bool(mean.isfinite()):
                self._known[name] = [(1 - EVEN) * each / mean + EVEN for each in whole]

    def at(self, layers: Sequence[str], batch: int, positions: Positions, rows: int) -> Tensor | None:
        """The weights of the rows at these positions, of all layers with the same inputs: the mean of theirs.

        None if they have none, or if there are not as many `rows`.
        """
        known = [self._known[name] for name in layers if name in self._known]
        if not known or any(batch >= len(each) for each in known):
            return None
        alike = [each[batch] for each in known if len(each[batch]) == len(known[0][batch])]
        mean = torch.stack(alike).mean(0)
        if positions.rows is not None:
            places = positions.rows.cpu()
            found = mean[places[places < len(mean)]]
        elif positions.size is not None:  # a convolution
            maps, rest = divmod(len(mean), math.prod(positions.size))
            if rest:
                return None
            found = mean.reshape(maps, *positions.size)[:, *positions.along(len(positions.size))].flatten()
        else:
            step, (top, left) = positions.step, positions.offset
            found = mean[top * step + left :: step * step]
        return found if len(found) == rows else None
