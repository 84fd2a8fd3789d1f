"""Room for the activations of many batches: in memory up to a limit, beyond it in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tspc.errors import RunError


class Room:
    """Memory that several stashes share; a folder of temporary files takes what does not fit."""

    def __init__(self, megabytes: float) -> None:
        self._left = megabytes * 2**20
        self._folder = tempfile.TemporaryDirectory(prefix="tspc-")
        self._files = 0

    def close(self) -> None:
        """Removes the files."""
        self._folder.cleanup()

    def take(self, size: float) -> bool:
        """Reserves bytes (negative: gives them back); False if there are not enough."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def write(self, value: Any) -> Path:
        """Raises RunError if there is no space."""
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.pt"
        try:
            torch.save(value, path)
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"cannot keep activations in {path.parent}: {error}; free some space there, name another folder by "
                "TMPDIR, or raise calibration.memory or phase.distill.memory"
            ) from error
        return path


class Stash:
    """One value (tensors in tuples, lists and dicts) for each batch; with `half`, float32 is kept as float16."""

    def __init__(self, room: Room, half: bool = False) -> None:
        self._room, self._half = room, half
        self._items: list[Any] = []
        self._held = 0

    def append(self, value: Any) -> None:
        if self._half:
            value = mapped(value, lambda t: t.half() if t.dtype == torch.float32 else t)
        size = sum(t.numel() * t.element_size() for t in tensors_in(value))
        if self._room.take(size):
            self._held += size
        else:
            value = self._room.write(value)
        self._items.append(value)

    def __getitem__(self, number: int) -> Any:
        item = self._items[number]
        value = torch.load(item, weights_only=True) if isinstance(item, Path) else item
        return mapped(value, lambda t: t.float() if t.dtype == torch.float16 else t) if self._half else value

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __len__(self) -> int:
        return len(self._items)

    def clear(self) -> None:
        for item in self._items:
            if isinstance(item, Path):
                item.unlink()
        self._room.take(-self._held)
        self._items, self._held = [], 0


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, change) for item in value)
    return {key: mapped(item, change) for key, item in value.items()} if isinstance(value, dict) else value
