"""The process's allocator, set for activations: large blocks that come and go with every batch."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""
KEPT = 1 << 30
"""Bytes at the end of the heap that are not given back."""


def keep_freed_memory() -> None:
    """Lets glibc keep up to a gigabyte of freed memory for the next batch.

    Otherwise it gives large blocks back at once and asks for them again, and the system clears every page of them: a
    third of the time of a small network on a CPU (`benchmarks/allocation.py`). Does nothing where the allocator is
    another one, or was set by its environment variables. For programs; a library leaves its process alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # no C library by that name, or none with this function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, KEPT)
