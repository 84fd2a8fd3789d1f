"""Held-out inputs that compare networks with the reference: what each network loses on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import DataError
from tspc.training.confidence import Drop
from tspc.training.evaluation import measure
from tspc.training.metrics import Again, Metric, Score, drop, losses

CHUNK = 250
"""Inputs that are measured together, where each has a number of its own."""
GROUP = 100
"""Inputs of a group, where only groups have numbers."""

Read = Callable[[int, int], Iterable[Any]]
"""Reads batches (inputs, targets), on the device, of the inputs from a start to an end."""


class HeldOut:
    """Judges networks by a metric against the `reference`, on `count` held-out inputs that `read` gives.

    The reference's scores are kept, and so are those of the network that was judged last.
    """

    def __init__(self, reference: nn.Module, metric: Metric, read: Read, count: int, device: torch.device) -> None:
        self.reference, self.metric, self.count = reference, metric, count
        self._read, self._device = read, device
        self._known: dict[tuple[int, int], Score] = {}
        self._last: tuple[nn.Module, dict[tuple[int, int], Score]] | None = None

    @property
    def has_counts(self) -> bool:
        """Whether each input is right or wrong."""
        return self.metric.is_proportion and self.metric.each is not None

    def drop(self, network: nn.Module, start: int, stop: int) -> Drop:
        """How much worse than the reference a network is on the inputs from `start` to `stop`.

        If the metric has a number for each input, these are paired. Else groups of inputs are, and the drop is the mean
        of theirs. Raises what `measure` raises.
        """
        if self._last is None or self._last[0] is not network:
            self._last = network, {}
        pairs = []
        for part in self._parts(start, stop):
            before = self._score(self.reference, part, self._known)
            pairs.append((before, self._score(network, part, self._last[1])))
        points = 100.0 if self.metric.is_share else 1.0
        each = [losses(self.metric, *pair) for pair in pairs]
        paired = [found for found in each if found is not None]
        if len(paired) == len(each):
            return Drop.of(torch.cat(paired) / points, points)
        return Drop.of(torch.tensor([drop(*pair) for pair in pairs], dtype=torch.float64))

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        has_each = self.metric.each is not None and self.metric.name != "perplexity"
        size = CHUNK if has_each else min(GROUP, max(1, (stop - start) // 30))
        return ((place, min(place + size, stop)) for place in range(start, stop, size))

    def _score(self, network: nn.Module, part: tuple[int, int], known: dict[tuple[int, int], Score]) -> Score:
        if part not in known:
            batches = Again(lambda: self._read(*part))
            known[part] = measure(self.metric, network, batches, self._device, self.reference)
        return known[part]


def reader_of(batches: Iterable[Any], device: torch.device) -> tuple[Read, int]:
    """How batches (inputs, targets) are read in parts, and how many inputs there are.

    An iterator is kept in memory; a list or a DataLoader is read again for every part. Raises DataError for batches of
    another form.
    """
    source: Iterable[Any] = batches if iter(batches) is not batches else list(batches)
    sizes = [len(_pair(batch)[1]) for batch in source]

    def read(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        place = 0
        for batch, size in zip(source, sizes, strict=True):
            low, high = max(start - place, 0), min(stop - place, size)
            if low < high:
                inputs, targets = _pair(batch)
                yield inputs[low:high].to(device), targets[low:high].to(device)
            place += size
            if place >= stop:
                return

    return read, sum(sizes)


def _pair(batch: Any) -> Sequence[Tensor]:
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch):
        return batch
    raise DataError(f"held_out: a batch is {type(batch).__name__}; expected a pair of tensors, inputs and targets")
