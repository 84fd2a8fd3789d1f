"""Integers of a few bits as bytes, without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed(integers: Tensor, bits: int) -> Tensor:
    """The lowest `bits` bits of each integer, in two's complement, one after the other: a vector of bytes (uint8)."""
    values = integers.detach().cpu().flatten().to(torch.int32).numpy()
    assert not values.size or -(1 << bits - 1) <= values.min() <= values.max() < 1 << bits - 1, "integers of this width"
    places = np.arange(bits, dtype=np.int32)
    found = ((values[:, None] >> places) & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(found.reshape(-1), bitorder="little"))


def unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers (int32) that `packed` wrote."""
    found = np.unpackbits(data.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    values = (found.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(1, dtype=np.int32)
    return torch.from_numpy(np.where(found[:, -1] > 0, values - (1 << bits), values).astype(np.int32))
