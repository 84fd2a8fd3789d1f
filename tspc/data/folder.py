"""Folders of images: `train/`, `val/` or `test/`, and perhaps `held_out/`, each with one folder for each class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tspc.data.base import (
    Batch,
    DataSpec,
    Feed,
    InMemory,
    existing,
    generator_of,
    held_out_indices,
    normalised,
    shuffled,
    steps_per_epoch,
    subset,
    training_order,
)
from tspc.data.images import Samples, Skipped, middle, opened, scan
from tspc.errors import DataError, shortened
from tspc.system.processes import ALONE, Share

FRESH = "held_out"
"""The folder of labelled images that neither the reference nor tspc was trained on; they judge a `max_drop`."""
PREFETCH = 4
"""Batches that each worker keeps ready."""


def image_folder(spec: DataSpec, data_dir: Path | None, download: bool) -> InMemory | Streaming:
    """The images of a folder: decoded once and kept if `spec.in_memory`, else decoded when needed.

    One warning names the files that are left out. Raises DataError for missing splits, for classes that differ between
    the splits or from `num_classes`, and for an image that cannot be read (at once, or when it is needed).
    """
    if data_dir is None:
        raise DataError(f"dataset={spec.name} needs data_dir=FOLDER with train/ and val/ (or test/) inside")
    root = existing(data_dir)
    assert root is not None
    train_dir = root / "train"
    test_dir = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        raise DataError(f"data_dir={root}: expected folders train/ and val/ (or test/) of class folders")
    skipped = Skipped()
    classes, train = scan(train_dir, skipped)
    others = [test_dir, *([root / FRESH] if (root / FRESH).is_dir() else [])]
    found = []
    for folder in others:
        own, samples = scan(folder, skipped)
        if classes != own:
            odd = sorted(set(classes) ^ set(own))
            raise DataError(
                f"data_dir={root}: {train_dir.name}/ and {folder.name}/ differ in the classes {shortened(odd[:5])}"
            )
        found.append(samples)
    test, *rest = found
    if spec.num_classes not in (None, len(classes)):
        raise DataError(f"dataset.num_classes={spec.num_classes}, but {train_dir} has {len(classes)} class folders")
    skipped.tell(root)
    if spec.in_memory:
        return InMemory(spec, len(classes), *(_decode(spec, samples) for samples in (train, test, *rest)))
    listing = [
        [(classes[label], path.relative_to(folder / classes[label]).as_posix()) for path, label in samples]
        for folder, samples in zip((train_dir, *others), (train, *found), strict=True)
    ]
    return Streaming(spec, len(classes), [train, *found], listing)


def _decode(spec: DataSpec, samples: Samples) -> Batch:
    size = (spec.image_size, spec.image_size)

    def pixels(sample: tuple[Path, int]) -> np.ndarray:
        image = opened(sample[0], spec.channels)
        image = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(*size, -1)

    with ThreadPoolExecutor() as pool:
        images = torch.from_numpy(np.stack(list(pool.map(pixels, samples))))
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in samples])


class _Files(Dataset):
    """Decoded images, H×W×C uint8. With a seed, the augmentation depends only on the seed and the image's index."""

    def __init__(
        self, samples: Samples, channels: int, transform: Callable[[Image.Image], Any], seed: int | None = None
    ) -> None:
        self.samples, self.channels, self.transform, self.seed = samples, channels, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path, label = self.samples[index]
        image = opened(path, self.channels)
        if self.seed is None:
            return self._pixels(middle(image)), label
        state = torch.get_rng_state()
        try:
            # torch.manual_seed would also seed every accelerator, which takes longer than a crop.
            torch.default_generator.manual_seed(self.seed * 1_000_003 + index)
            return self._pixels(image), label
        finally:
            torch.set_rng_state(state)

    def _pixels(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(self.transform(image))
        return pixels if pixels.ndim == 3 else pixels[..., None]


class Streaming:
    """Images decoded by worker processes as they are needed: random crop and flip, or resize and centre crop."""

    def __init__(
        self, spec: DataSpec, num_classes: int, splits: Sequence[Samples], listing: list[list[tuple[str, str]]]
    ) -> None:
        """`splits` are train, test, and held out if there is one.

        `listing` has, for each split, the class of each image and its path within the class.
        """
        train, test, *fresh = splits
        self.spec, self.num_classes = spec, num_classes
        self.train_size, self.test_size, self.fresh_size = len(train), len(test), sum(map(len, fresh))
        # From the names only: the sizes of a million files take minutes on a network drive.
        digests = [hashlib.sha256(repr(part).encode()).hexdigest()[:16] for part in (listing[:2], listing[2:])]
        self.fingerprint, self.fresh_fingerprint = digests[0], digests[1] if fresh else ""
        from torchvision.transforms import v2  # takes a second

        resize = spec.resize or spec.image_size
        flip = [v2.RandomHorizontalFlip()] if spec.flip else []
        augment = v2.Compose([v2.RandomResizedCrop(spec.image_size), *flip])
        centre = v2.Compose([v2.Resize(resize), v2.CenterCrop(spec.image_size)])
        self._train, self._augment = train, augment
        self._test = _Files(test, spec.channels, centre)
        self._plain_train = _Files(train, spec.channels, centre)
        self._fresh = _Files(fresh[0] if fresh else [], spec.channels, centre)

    def steps(self, feed: Feed) -> int:
        return steps_per_epoch(self.train_size, feed)

    def train_batches(self, feed: Feed, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = training_order(self.train_size, feed, epoch)[: self.steps(feed) * feed.batch_size]
        drawn = int(torch.randint(2**31, (1,), generator=generator_of(feed.seed, epoch)))
        files = _Files(self._train, self.spec.channels, self._augment, drawn)
        batches = [feed.share.of(batch) for batch in order.split(feed.batch_size)[start:]]
        yield from self._batches(files, batches, feed.device)

    def test_batches(
        self, batch_size: int, device: torch.device, limit: int | None = None, share: Share = ALONE
    ) -> Iterator[Batch]:
        yield from self._batches(self._test, _split(share.of(subset(self.test_size, limit)), batch_size), device)

    def held_out_batches(
        self, count: int, batch_size: int, device: torch.device, share: Share = ALONE, reserved: int = 0
    ) -> Iterator[Batch]:
        indices = share.of(held_out_indices(self.train_size, count, reserved))
        yield from self._batches(self._plain_train, _split(indices, batch_size), device)

    def fresh_batches(self, start: int, stop: int, batch_size: int, device: torch.device) -> Iterator[Batch]:
        indices = shuffled(self.fresh_size)[start:stop]
        yield from self._batches(self._fresh, _split(indices, batch_size), device)

    def calibration_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        for images, _ in self._batches(self._plain_train, _split(subset(self.train_size, count), batch_size), device):
            yield images

    def _batches(self, files: _Files, batches: Sequence[Tensor], device: torch.device) -> Iterator[Batch]:
        loader = DataLoader(
            files,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.spec.workers,
            prefetch_factor=PREFETCH if self.spec.workers else None,
            pin_memory=device.type == "cuda",
            collate_fn=_collated,
        )
        try:
            for images, labels in loader:
                on_device = images.to(device, non_blocking=True)
                yield normalised(on_device, self.spec), labels.to(device, non_blocking=True)
        except DataError as error:
            # The message of a worker's error is its traceback; the last line is our message.
            raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from None


def _collated(samples: list[tuple[np.ndarray, int]]) -> Batch:
    """A batch of uint8 images (N, C, H, W), channels last: a quarter of the bytes of float32, and no copy later."""
    images = torch.from_numpy(np.stack([pixels for pixels, _ in samples]))
    return images.permute(0, 3, 1, 2), torch.tensor([label for _, label in samples])


def _split(indices: Tensor, batch_size: int) -> Sequence[Tensor]:
    return indices.split(batch_size) if len(indices) else ()
