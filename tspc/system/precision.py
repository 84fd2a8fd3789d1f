"""Number formats that the machine multiplies fast."""

from __future__ import annotations

from functools import cache

import torch


def rough(device: torch.device) -> torch.dtype:
    """bfloat16 where a CPU multiplies it faster than float32, else float32.

    It is enough for a direction in which something is sought, if the result is judged more precisely.
    """
    return torch.bfloat16 if device.type == "cpu" and _has_bfloat16() else torch.float32


@cache
def _has_bfloat16() -> bool:
    # Older releases of PyTorch lack some of these.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
