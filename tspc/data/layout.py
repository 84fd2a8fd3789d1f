"""Images for networks that fail with channels last."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tspc.data.base import Batch, Data, Feed
from tspc.data.model_inputs import Given
from tspc.system.processes import ALONE, Share


class Contiguous:
    """Another data set's batches, contiguous in memory."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.num_classes, self.fingerprint = data.num_classes, data.fingerprint
        self.fresh_fingerprint = data.fresh_fingerprint
        self.train_size, self.test_size, self.fresh_size = data.train_size, data.test_size, data.fresh_size

    def steps(self, feed: Feed) -> int:
        return self._data.steps(feed)

    def train_batches(self, feed: Feed, epoch: int, start: int = 0) -> Iterator[Batch]:
        return _contiguous(self._data.train_batches(feed, epoch, start))

    def test_batches(
        self, batch_size: int, device: torch.device, limit: int | None = None, share: Share = ALONE
    ) -> Iterator[Batch]:
        return _contiguous(self._data.test_batches(batch_size, device, limit, share))

    def held_out_batches(
        self, count: int, batch_size: int, device: torch.device, share: Share = ALONE, reserved: int = 0
    ) -> Iterator[Batch]:
        return _contiguous(self._data.held_out_batches(count, batch_size, device, share, reserved))

    def fresh_batches(self, start: int, stop: int, batch_size: int, device: torch.device) -> Iterator[Batch]:
        return _contiguous(self._data.fresh_batches(start, stop, batch_size, device))

    def calibration_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Given]:
        return (images.contiguous() for images in self._data.calibration_batches(count, batch_size, device))


def _contiguous(batches: Iterator[Batch]) -> Iterator[Batch]:
    return ((images.contiguous(), labels) for images, labels in batches)
