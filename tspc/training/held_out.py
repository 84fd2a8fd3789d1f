"""Held-out inputs that compare networks with the reference: what each network loses on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data.arranging import collected, inputs_of, labels_of
from tspc.data.model_inputs import Given, first_of, has_lengths, joined, sizes_of
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


def reader_of(
    batches: Any, device: torch.device, model: nn.Module | None = None, needs_labels: bool = True
) -> tuple[Read, int]:
    """How batches (inputs, targets) are read in parts, and how many inputs there are.

    Inputs are a tensor, or what else `model` takes by `tspc.data.arranging`; a batch may also be a dict with labels, or
    without them if these are not needed. Batches are read once and kept in memory, in a random order that is always the
    same: data is often sorted by class, and a loader may shuffle. Texts, and other sequences, of one length are read
    together. Raises DataError for batches of another form.
    """
    if isinstance(batches, Tensor | str) or not isinstance(batches, Iterable):
        raise _unfit(batches)
    if isinstance(batches, list | tuple) and len(batches) == 2 and all(isinstance(x, Tensor) for x in batches):
        raise DataError("held_out is a pair of tensors; give a list of batches: held_out=[(inputs, targets)]")
    given = [batches] if isinstance(batches, Mapping) else batches
    pairs = [_pair(batch, model, needs_labels) for batch in given]
    if not pairs:
        raise DataError("held_out has no batch")
    groups = _groups(pairs)
    ends = torch.tensor([len(targets) for _, targets in groups]).cumsum(0)
    order = torch.randperm(int(ends[-1]), generator=torch.Generator().manual_seed(0))

    def read(start: int, stop: int) -> Iterator[tuple[Given, Tensor]]:
        for chosen in order[start:stop].split(CHUNK):
            group = torch.bucketize(chosen, ends, right=True)
            for number in group.unique().tolist():
                (inputs, targets), first = groups[number], int(ends[number]) - len(groups[number][1])
                rows = chosen[group == number] - first
                yield inputs[rows].to(device), targets[rows].to(device)

    return read, len(order)


def _groups(pairs: Sequence[tuple[Given, Tensor]]) -> list[tuple[Given, Tensor]]:
    """The inputs and targets of batches with equal sizes together."""
    by_size: dict[Any, list[tuple[Given, Tensor]]] = {}
    for inputs, targets in pairs:
        by_size.setdefault((sizes_of(inputs), targets.shape[1:]), []).append((inputs, targets))
    first, second = (next(iter(by_size), None), list(by_size)[-1])
    if first != second and not has_lengths(pairs[0][0]):
        raise DataError(f"held_out: the batches do not fit together ({first} and {second})")
    found: list[tuple[Given, Tensor]] = []
    for group in by_size.values():
        whole = joined([inputs for inputs, _ in group])
        found += group if whole is None else [(whole, torch.cat([targets for _, targets in group]))]
    return found


def _pair(batch: Any, model: nn.Module | None, needs_labels: bool) -> tuple[Given, Tensor]:
    if isinstance(batch, Mapping):
        given = collected(batch)
        found = labels_of(given)
        if found is None and needs_labels:
            raise DataError(f"held_out: a batch has no labels among {', '.join(map(str, batch))}")
        targets = torch.zeros(len(given), dtype=torch.long) if found is None else found
        inputs = given if model is None else inputs_of(model, batch)
    elif isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        inputs, targets = batch
        if not isinstance(inputs, Tensor):
            inputs = collected(inputs) if model is None else inputs_of(model, inputs)
    else:
        raise _unfit(batch)
    first = first_of(inputs)
    if not first.ndim or not targets.ndim or len(first) != len(targets):
        shapes = f"{tuple(first.shape)} and {tuple(targets.shape)}"
        raise DataError(f"held_out: inputs and targets of a batch have shapes {shapes}; the first axis counts both")
    return inputs, targets


def _unfit(batch: Any) -> DataError:
    return DataError(
        f"held_out: a batch is {type(batch).__name__}; expected a pair of inputs and targets (tensors), or a dict with "
        "labels"
    )
