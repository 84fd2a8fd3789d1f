"""Held-out inputs that compare networks with the reference: what each network loses on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import ConfigError, DataError
from tspc.training.confidence import Drop
from tspc.training.evaluation import measure
from tspc.training.metrics import Again, Metric, Score, drop, losses

CHUNK = 250
"""Inputs that are measured together, where each has a number of its own."""
GROUPS = 30
"""The number of groups of inputs, where only groups have numbers."""

Read = Callable[[int, int], Iterable[Any]]
"""Reads batches (inputs, targets), on the device, of the inputs from a start to an end; the same at every time."""


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
        return self.metric.has_counts

    def check(self, limit: float, inputs: int) -> None:
        """Raises ConfigError if a limit in points says nothing, as the reference shows on the first `inputs`."""
        name = f"metric={self.metric.name}"
        scores = [self._score(self.reference, part, self._known) for part in self._parts(0, inputs)]
        if self.metric.is_share and limit >= 100:
            raise ConfigError([f"max_drop={limit:g}: {self.metric.label} is a share, so it cannot fall by 100 points"])
        values = [score.value for score in scores]
        if self.has_counts and max(values) <= 0:
            raise ConfigError([f"{name} of the reference is 0 on {inputs:,} held-out inputs: are the labels right?"])
        if self.metric.function is not None and limit >= 1 and min(values) >= 0 and max(values) <= 1:
            told = f"its values lie between 0 and 1, so a drop of {limit:g} allows everything"
            raise ConfigError([f"max_drop={limit:g} with {name}: {told}; give max_drop={limit / 100:g}, for example"])

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
            return Drop.of(torch.cat(paired) / points, points, is_counted=self.has_counts)
        own = torch.tensor([drop(*pair) for pair in pairs], dtype=torch.float64)
        return Drop.of(own, inputs=stop - start)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Parts of `CHUNK` inputs, or `GROUPS` equal groups."""
        if self.metric.each is not None and self.metric.name != "perplexity":
            ends = [*range(start, stop, CHUNK), stop]
        else:
            groups = max(1, min(GROUPS, stop - start))
            ends = [start + place * (stop - start) // groups for place in range(groups + 1)]
        return pairwise(ends)

    def _score(self, network: nn.Module, part: tuple[int, int], known: dict[tuple[int, int], Score]) -> Score:
        if part not in known:
            batches = Again(lambda: self._read(*part))
            score = measure(self.metric, network, batches, self._device, self.reference)
            if score.count != part[1] - part[0]:
                told = f"it judged {score.count} of {part[1] - part[0]} held-out inputs"
                raise ConfigError([f"metric={self.metric.name}: {told}; it must read all batches"])
            known[part] = score
        return known[part]


def reader_of(batches: Any, device: torch.device) -> tuple[Read, int]:
    """How batches (inputs, targets) are read in parts, and how many inputs there are.

    They are read once and kept in memory, in a random order that is always the same: data is often sorted by class, and
    a loader may shuffle. Raises DataError for batches of another form.
    """
    if isinstance(batches, Tensor | str) or not isinstance(batches, Iterable):
        raise _unfit(batches)
    if isinstance(batches, list | tuple) and len(batches) == 2 and all(isinstance(x, Tensor) for x in batches):
        raise DataError("held_out is a pair of tensors; give a list of batches: held_out=[(inputs, targets)]")
    pairs = [_pair(batch) for batch in batches]
    if not pairs:
        raise DataError("held_out has no batch")
    try:
        inputs, targets = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    except RuntimeError as error:
        raise DataError(f"held_out: the batches do not fit together ({str(error).splitlines()[0]})") from error
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))

    def read(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in order[start:stop].split(CHUNK):
            yield inputs[chosen].to(device), targets[chosen].to(device)

    return read, len(targets)


def _pair(batch: Any) -> Sequence[Tensor]:
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
        raise _unfit(batch)
    inputs, targets = batch
    if not inputs.ndim or not targets.ndim or len(inputs) != len(targets):
        shapes = f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
        raise DataError(f"held_out: inputs and targets of a batch have shapes {shapes}; the first axis counts both")
    return batch


def _unfit(batch: Any) -> DataError:
    return DataError(f"held_out: a batch is {type(batch).__name__}; expected a pair of tensors, inputs and targets")
