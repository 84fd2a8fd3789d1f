"""The interface of data sets: batches on the device, every test image exactly once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tspc.data.model_inputs import Given
from tspc.data.spec import DataSpec
from tspc.errors import DataError
from tspc.system.processes import ALONE, Share

Batch = tuple[Any, Tensor]
"""Inputs and targets. The inputs are a tensor, such as images, or `ModelInputs`."""


@dataclass(frozen=True)
class Feed:
    """How the training split is read: in shuffled batches of `batch_size` images, all processes together.

    `held_out` images are left out (see `Data.held_out_batches`), and the `reserved` ones behind them, which judge the
    finished network. Everything random in a batch follows from the seed, the epoch and the number of the batch. So any
    batch can be read without the ones before it, and an image is augmented in the same way in every process.
    """

    batch_size: int
    seed: int
    device: torch.device
    held_out: int = 0
    share: Share = ALONE
    reserved: int = 0

    @property
    def left_out(self) -> int:
        """The number of images that are not trained on."""
        return self.held_out + self.reserved


class Data(Protocol):
    """A training and a test split."""

    num_classes: int
    train_size: int
    test_size: int
    fresh_size: int
    """The number of labelled images that neither the reference nor tspc was trained on, besides the test split."""
    fresh_fingerprint: str
    """A digest of the fresh images, which matter to a limit on the drop alone; empty if there are none."""
    fingerprint: str
    """A digest of the other content (for streamed sets, of the file names); it does not depend on the folder."""

    def train_batches(self, feed: Feed, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Augmented float batches (N, C, H, W) and labels (N) of one pass, from the batch number `start` on.

        The last, incomplete batch is left out, unless it is the only one.
        """
        ...

    def test_batches(
        self, batch_size: int, device: torch.device, limit: int | None = None, share: Share = ALONE
    ) -> Iterator[Batch]:
        """Every test image exactly once, or a fixed random subset of `limit` images."""
        ...

    def held_out_batches(
        self, count: int, batch_size: int, device: torch.device, share: Share = ALONE, reserved: int = 0
    ) -> Iterator[Batch]:
        """The training images that a feed with `held_out=count` leaves out, not augmented, each once.

        The `reserved` images behind them are left out, too.
        """
        ...

    def fresh_batches(self, start: int, stop: int, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """The fresh images from `start` to `stop` of a fixed random order, not augmented."""
        ...

    def calibration_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Given]:
        """A fixed random choice of training images, neither augmented nor labelled."""
        ...

    def steps(self, feed: Feed) -> int:
        """Batches in one pass over the training split."""
        ...


AT_ONCE = 250
"""The number of inputs that are judged at once, unless the data set says another one."""


def at_once(data: Data) -> int:
    """The number of inputs of a data set that are judged at once: fewer where an answer takes much memory."""
    return getattr(data, "at_once", AT_ONCE)


def steps_per_epoch(train_size: int, feed: Feed) -> int:
    return max(1, (train_size - feed.left_out) // feed.batch_size)


def training_order(train_size: int, feed: Feed, epoch: int) -> Tensor:
    """Indices of the training images of a pass, in order."""
    kept = shuffled(train_size)[: train_size - feed.left_out].sort().values
    return kept[torch.randperm(len(kept), generator=generator_of(feed.seed, epoch))]


def held_out_indices(train_size: int, count: int, reserved: int = 0) -> Tensor:
    """Indices of the held-out training images; they overlap as little as possible with those of `subset`."""
    end = train_size - reserved
    return shuffled(train_size)[end - count : end].sort().values


def subset(size: int, limit: int | None) -> Tensor:
    """Indices of the images of a split that are used, in order; a subset does not depend on the run's seed."""
    if limit is None or limit >= size:
        return torch.arange(size)
    return shuffled(size)[:limit].sort().values


def shuffled(size: int) -> Tensor:
    """The indices of a split in a random order that is always the same."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))


def generator_of(*numbers: int) -> torch.Generator:
    """A generator that is seeded by the given whole numbers only, so that a resumed run draws the same numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def existing(data_dir: Path | None) -> Path | None:
    """`data_dir` if given. Raises DataError if it is not a folder."""
    if data_dir is not None and not os.path.isdir(data_dir):
        raise DataError(f"data_dir={data_dir}: there is no such folder (looked for {os.path.abspath(data_dir)})")
    return data_dir


class InMemory:
    """Splits held as uint8 tensors (N, C, H, W); batches are augmented and normalised on the device."""

    def __init__(self, spec: DataSpec, num_classes: int, train: Batch, test: Batch, fresh: Batch | None = None) -> None:
        splits = {"training": train, "test": test} | ({} if fresh is None else {"held-out": fresh})
        for split, (images, labels) in splits.items():
            if len(images) == 0:
                raise DataError(f"{spec.name}: the {split} split has no images")
            if int(labels.max()) >= num_classes:
                raise DataError(
                    f"{spec.name}: a {split} label is {int(labels.max())}, but dataset.num_classes={num_classes}"
                )
        self.spec, self.num_classes = spec, num_classes
        self.train_size, self.test_size = len(train[0]), len(test[0])
        self.fresh_size = 0 if fresh is None else len(fresh[0])
        self._splits = {"train": train, "test": test} | ({} if fresh is None else {"fresh": fresh})
        self.fingerprint = _digest(*train, *test)
        self.fresh_fingerprint = "" if fresh is None else _digest(*fresh)
        self._on_device: dict[tuple[str, torch.device], Batch] = {}

    def steps(self, feed: Feed) -> int:
        return steps_per_epoch(self.train_size, feed)

    def train_batches(self, feed: Feed, epoch: int, start: int = 0) -> Iterator[Batch]:
        images, labels = self._moved("train", feed.device)
        order = training_order(self.train_size, feed, epoch)
        for step in range(start, self.steps(feed)):
            batch = order[step * feed.batch_size : (step + 1) * feed.batch_size]
            drawn = self._draw(len(batch), generator_of(feed.seed, epoch, step))
            index = feed.share.of(batch).to(feed.device)
            augmented = self._augment(images[index], [feed.share.of(d).to(feed.device) for d in drawn])
            yield normalised(augmented, self.spec), labels[index]

    def test_batches(
        self, batch_size: int, device: torch.device, limit: int | None = None, share: Share = ALONE
    ) -> Iterator[Batch]:
        yield from self._plain("test", share.of(subset(self.test_size, limit)), batch_size, device)

    def held_out_batches(
        self, count: int, batch_size: int, device: torch.device, share: Share = ALONE, reserved: int = 0
    ) -> Iterator[Batch]:
        indices = share.of(held_out_indices(self.train_size, count, reserved))
        yield from self._plain("train", indices, batch_size, device)

    def fresh_batches(self, start: int, stop: int, batch_size: int, device: torch.device) -> Iterator[Batch]:
        yield from self._plain("fresh", shuffled(self.fresh_size)[start:stop], batch_size, device)

    def _plain(self, split: str, indices: Tensor, batch_size: int, device: torch.device) -> Iterator[Batch]:
        images, labels = self._moved(split, device)
        for index in indices.split(batch_size) if len(indices) else ():
            index = index.to(device)
            yield normalised(images[index], self.spec), labels[index]

    def calibration_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        for images, _ in self._plain("train", subset(self.train_size, count), batch_size, device):
            yield images

    def _moved(self, split: str, device: torch.device) -> Batch:
        key = split, device
        if key not in self._on_device:
            images, labels = self._splits[split]
            self._on_device[key] = images.to(device), labels.to(device)
        return self._on_device[key]

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For each image of a batch how far it moves down and to the right, and whether it is mirrored."""
        down, right = torch.randint(2 * self.spec.pad + 1, (2, count, 1), generator=generator)
        return down, right, torch.rand(count, generator=generator) < 0.5

    def _augment(self, images: Tensor, drawn: Sequence[Tensor]) -> Tensor:
        n, _, h, w = images.shape
        down, right, mirrored = drawn
        if self.spec.pad:
            padded = torch.nn.functional.pad(images, (self.spec.pad,) * 4)
            if images.device.type == "cpu":  # slices are far faster there than indices
                places = zip(padded, down.flatten().tolist(), right.flatten().tolist(), strict=True)
                images = torch.stack([image[:, y : y + h, x : x + w] for image, y, x in places])
            else:
                rows = down + torch.arange(h, device=images.device)
                columns = right + torch.arange(w, device=images.device)
                which = torch.arange(n, device=images.device)[:, None, None]
                # Indexing by image, row and column puts the channels last.
                images = padded.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
        if self.spec.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


def normalised(images: Tensor, spec: DataSpec) -> Tensor:
    """uint8 images (N, C, H, W) as float32, normalised by mean and deviation, channels last."""
    mean, std = (255 * torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (spec.mean, spec.std))
    images = (images.float() - mean) / std
    # Grey images get three channels for a network that takes colour.
    if images.shape[1] == 1 and spec.channels > 1:
        images = images.expand(-1, spec.channels, -1, -1)
    return images.contiguous(memory_format=torch.channels_last)
