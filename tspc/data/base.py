"""What a data set is to the rest of tspc: batches on the device, every test image exactly once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tspc.errors import DataError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DataSpec:
    """Which data set, and how its images reach the network.

    `kind` names the loader. `num_classes` may be None where the class folders tell it. `mean` and `std` are
    per channel, for pixel values in [0, 1]. `pad` (pixels of random shift) and `flip` are the training
    augmentation of small images; `in_memory` keeps all of them decoded, as uint8.
    """

    kind: str
    name: str
    num_classes: int | None
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False
    in_memory: bool = True
    resize: int | None = None
    workers: int = 2
    options: dict[str, Any] = field(default_factory=dict)


class Data(Protocol):
    """A training and a test split."""

    num_classes: int
    train_size: int
    test_size: int
    fingerprint: str
    """A digest of the content (of large streamed sets, of the file names), the same wherever the data lies."""

    def train_batches(self, batch_size: int, seed: int, epoch: int, device: torch.device) -> Iterator[Batch]:
        """Augmented, shuffled float batches (N, C, H, W) and labels (N); the same for the same seed and epoch.

        The last, incomplete batch is left out, unless it is the only one.
        """
        ...

    def test_batches(self, batch_size: int, device: torch.device, limit: int | None = None) -> Iterator[Batch]:
        """Every test image exactly once, or a fixed random subset of `limit` images."""
        ...

    def calibration_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """A fixed random choice of training images, neither augmented nor labelled."""
        ...

    def steps(self, batch_size: int) -> int:
        """Batches in one pass over the training split."""
        ...


def steps_per_epoch(train_size: int, batch_size: int) -> int:
    return max(1, train_size // batch_size)


def subset(size: int, limit: int | None) -> Tensor:
    """Indices of the images of a split to use, in order; a subset does not depend on any seed of the run."""
    if limit is None or limit >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers of one epoch: independent of what was drawn before, so that a resumed run sees the same."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def existing(data_dir: Path | None) -> Path | None:
    """`data_dir` if given. Raises DataError if it is not a folder."""
    if data_dir is not None and not os.path.isdir(data_dir):
        raise DataError(f"data_dir={data_dir}: there is no such folder")
    return data_dir


class InMemory:
    """Splits held as uint8 tensors (N, C, H, W); batches are augmented and normalised on the device."""

    def __init__(self, spec: DataSpec, num_classes: int, train: Batch, test: Batch) -> None:
        for split, (images, labels) in (("training", train), ("test", test)):
            if len(images) == 0:
                raise DataError(f"{spec.name}: the {split} split has no images")
            if int(labels.max()) >= num_classes:
                raise DataError(
                    f"{spec.name}: a {split} label is {int(labels.max())}, but dataset.num_classes={num_classes}"
                )
        self.spec, self.num_classes = spec, num_classes
        self.train_size, self.test_size = len(train[0]), len(test[0])
        self._splits = {"train": train, "test": test}
        self.fingerprint = _digest(*train, *test)
        self._on_device: dict[tuple[str, torch.device], Batch] = {}

    def steps(self, batch_size: int) -> int:
        return steps_per_epoch(self.train_size, batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int, device: torch.device) -> Iterator[Batch]:
        images, labels = self._moved("train", device)
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(self.train_size, generator=generator)
        for step in range(self.steps(batch_size)):
            index = order[step * batch_size : (step + 1) * batch_size].to(device)
            batch = self._augment(images[index], generator)
            yield self._normalise(batch), labels[index]

    def test_batches(self, batch_size: int, device: torch.device, limit: int | None = None) -> Iterator[Batch]:
        images, labels = self._moved("test", device)
        for index in subset(self.test_size, limit).split(batch_size):
            index = index.to(device)
            yield self._normalise(images[index]), labels[index]

    def calibration_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        images, _ = self._moved("train", device)
        for index in subset(self.train_size, count).split(batch_size):
            yield self._normalise(images[index.to(device)])

    def _moved(self, split: str, device: torch.device) -> Batch:
        key = split, device
        if key not in self._on_device:
            images, labels = self._splits[split]
            self._on_device[key] = images.to(device), labels.to(device)
        return self._on_device[key]

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, h, w = images.shape
        if self.spec.pad:
            pad = self.spec.pad
            shifts = torch.randint(2 * pad + 1, (2, n, 1), generator=generator).to(images.device)
            rows = shifts[0] + torch.arange(h, device=images.device)
            columns = shifts[1] + torch.arange(w, device=images.device)
            padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
            which = torch.arange(n, device=images.device)[:, None, None]
            # Indexing by image, row and column puts the channels last.
            images = padded.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
        if self.spec.flip:
            chosen = torch.rand(n, generator=generator).to(images.device) < 0.5
            images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
        return images

    def _normalise(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.spec.mean, device=images.device).view(-1, 1, 1) * 255
        std = torch.tensor(self.spec.std, device=images.device).view(-1, 1, 1) * 255
        images = (images.float() - mean) / std
        # Grey images for a network that takes colour.
        if images.shape[1] == 1 and self.spec.channels > 1:
            images = images.expand(-1, self.spec.channels, -1, -1)
        return images.contiguous(memory_format=torch.channels_last)
