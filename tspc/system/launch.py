"""The number of processes that torchrun or accelerate started, and the rank of this one."""

from __future__ import annotations

import os


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes files and prints; true if it is the only one."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"
