"""What torchrun or accelerate tell a process that they started: how many there are, and which one it is."""

from __future__ import annotations

import os


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and speaks; true where it is the only one."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"
