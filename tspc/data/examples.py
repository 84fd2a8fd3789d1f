"""A data set of single inputs that are put together to batches when they are read: texts, sounds, the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tspc.data.base import (
    AT_ONCE,
    Feed,
    generator_of,
    held_out_indices,
    shuffled,
    steps_per_epoch,
    subset,
    training_order,
)
from tspc.data.collating import Example, collated, tensor_of
from tspc.data.model_inputs import Given
from tspc.errors import DataError
from tspc.system.processes import ALONE, Share

Split = Sequence[Example]
LOOKED_AT = 64
"""The number of inputs in a split that its digest reads, where they are the user's own."""


class Examples:
    """Splits of examples. A batch is padded to its longest input.

    Every batch follows from the seed, the epoch and its number, so any of them can be read without those before it;
    what a split of the user's draws at random, with PyTorch, does so, too. `fills` says with which number an argument
    is padded, if not with 0.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        splits: Mapping[str, Split],
        fills: Mapping[str, int] | None = None,
        at_once: int = AT_ONCE,
        classes: Sequence[str] = (),
    ) -> None:
        """`splits` are `train`, `test`, and perhaps `held_out`; `at_once` inputs are judged at once.

        `classes` are the names of the classes by their numbers, where they have names.

        Raises DataError for a split without inputs.
        """
        empty = [split for split, examples in splits.items() if len(examples) == 0]
        if empty:
            raise DataError(f"{name}: the split {empty[0]} has no inputs")
        self.name, self.num_classes, self.at_once, self.classes = name, num_classes, at_once, tuple(classes)
        self._splits, self._fills = dict(splits), dict(fills or {})
        self.train_size, self.test_size = len(splits["train"]), len(splits["test"])
        self.fresh_size = len(splits.get("held_out", ()))
        largest = [getattr(examples, "largest_token", None) for examples in splits.values()]
        self.largest_token: int | None = max((token for token in largest if token is not None), default=None)
        digests = {split: digest_of(examples) for split, examples in splits.items()}
        self.fresh_fingerprint = digests.pop("held_out", "")
        self.fingerprint = hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16]

    def steps(self, feed: Feed) -> int:
        return steps_per_epoch(self.train_size, feed)

    def train_batches(self, feed: Feed, epoch: int, start: int = 0) -> Iterator[tuple[Given, Tensor]]:
        order = training_order(self.train_size, feed, epoch)
        for step in range(start, self.steps(feed)):
            batch = order[step * feed.batch_size : (step + 1) * feed.batch_size]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator_of(feed.seed, epoch, step).initial_seed())
                made = self._batch("train", feed.share.of(batch), feed.device)
            yield made

    def test_batches(
        self, batch_size: int, device: torch.device, limit: int | None = None, share: Share = ALONE
    ) -> Iterator[tuple[Given, Tensor]]:
        yield from self._plain("test", share.of(subset(self.test_size, limit)), batch_size, device)

    def held_out_batches(
        self, count: int, batch_size: int, device: torch.device, share: Share = ALONE, reserved: int = 0
    ) -> Iterator[tuple[Given, Tensor]]:
        indices = share.of(held_out_indices(self.train_size, count, reserved))
        yield from self._plain("train", indices, batch_size, device)

    def fresh_batches(
        self, start: int, stop: int, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Given, Tensor]]:
        yield from self._plain("held_out", shuffled(self.fresh_size)[start:stop], batch_size, device)

    def calibration_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Given]:
        for inputs, _ in self._plain("train", subset(self.train_size, count), batch_size, device):
            yield inputs

    def _plain(
        self, split: str, indices: Tensor, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Given, Tensor]]:
        for index in indices.split(batch_size) if len(indices) else ():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made = self._batch(split, index, device)
            yield made

    def _batch(self, split: str, index: Tensor, device: torch.device) -> tuple[Given, Tensor]:
        examples = self._splits[split]
        places: list[int] = index.tolist()
        try:
            inputs, targets = collated([examples[place] for place in places], self._fills)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error
        return inputs.to(device), targets.to(device)


def digest_of(examples: Split) -> str:
    """A digest of a split: its own if it has one (`digest`), else of its length and of inputs spread over it."""
    own = getattr(examples, "digest", None)
    if isinstance(own, str):
        return own
    found = hashlib.sha256(str(len(examples)).encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for place in range(0, len(examples), max(1, len(examples) // LOOKED_AT)):
            given, target = examples[place]
            parts = given.items() if isinstance(given, Mapping) else [("", given)]
            for name, value in [*parts, ("target", target)]:
                add_to(found, str(name), tensor_of(value, str(name) or "an input"))
    return found.hexdigest()[:16]


def add_to(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Adds a named tensor to a digest."""
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
