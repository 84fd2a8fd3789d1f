"""Integers of a few bits as bytes, without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PART = 2**20
"""Integers that are packed at once, a multiple of eight: each needs the memory of several numbers for every bit."""


def packed(integers: Tensor, bits: int) -> Tensor:
    """The lowest `bits` bits of each integer, in two's complement, one after the other: a vector of bytes (uint8)."""
    flat = integers.detach().cpu().flatten()
    return torch.cat([_packed(part, bits) for part in flat.split(PART)])


def _packed(integers: Tensor, bits: int) -> Tensor:
    values = integers.to(torch.int32).numpy()
    assert not values.size or -(1 << bits - 1) <= values.min() <= values.max() < 1 << bits - 1, "integers of this width"
    places = np.arange(bits, dtype=np.int32)
    found = ((values[:, None] >> places) & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(found.reshape(-1), bitorder="little"))


def unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers (int32) that `packed` wrote."""
    parts = data.cpu().split(PART // 8 * bits)
    counts = [min(PART, count - start) for start in range(0, max(count, 1), PART)]
    return torch.cat([_unpacked(part, bits, own) for part, own in zip(parts, counts, strict=True)])


def _unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    found = np.unpackbits(data.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    values = (found.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(1, dtype=np.int32)
    return torch.from_numpy(np.where(found[:, -1] > 0, values - (1 << bits), values).astype(np.int32))
