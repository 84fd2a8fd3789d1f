"""Keeps the activations of many batches: in memory up to a limit, the rest in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import RunError
from tspc.store.files import why_unwritten
from tspc.traversal.nested import mapped

LEAST = 2**-13
"""If the largest number of a tensor is smaller than this, float16 cannot keep its digits."""


class Room:
    """Memory that several stashes share, and a folder of temporary files for the rest.

    Raises RunError if that folder cannot be made.
    """

    def __init__(self, megabytes: float) -> None:
        self._left = megabytes * 2**20
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="tspc-")
        except OSError as error:
            raise RunError(
                f"cannot make a folder for temporary files: {error.strerror}; free space, or name a folder by TMPDIR"
            ) from error
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

    def write(self, tensors: Sequence[Tensor | None]) -> Path:
        """Writes plain tensors to a file, so that reading them runs no code. Raises RunError if there is no space."""
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.pt"
        try:
            torch.save(list(tensors), path)
        except (OSError, RuntimeError) as error:
            reason, _ = why_unwritten(error, path)
            path.unlink(missing_ok=True)
            raise RunError(
                f"cannot keep activations in {path.parent}: {reason}; free some space there, name another folder by "
                "TMPDIR, or raise calibration.memory or phase.distill.memory"
            ) from error
        return path


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in a value."""

    number: int


@dataclass(frozen=True)
class _Item:
    """A value without its tensors, and the tensors: in memory, or None if they are in the file.

    `narrow` says which ones are kept as float16.
    """

    value: Any
    tensors: list[Tensor | None]
    narrow: list[bool]
    file: Path | None
    shapes: tuple[torch.Size, ...]

    def read(self) -> Any:
        written: list[Any] = [None] * len(self.tensors)
        if self.file is not None:
            written = torch.load(self.file, weights_only=True)
        kept = [there if here is None else here for here, there in zip(self.tensors, written, strict=True)]
        wide = [t.float() if narrow else t for t, narrow in zip(kept, self.narrow, strict=True)]
        return mapped(self.value, lambda slot: wide[slot.number], _Slot)


class Stash:
    """One value (tensors in whatever `tspc.traversal.nested` copies) for each batch.

    With `half`, float32 tensors that fit into the range of float16 are kept as float16. Only plain tensors are written
    to files; the values that held them stay in memory, and so do tensors of other classes.
    """

    def __init__(self, room: Room, half: bool = False) -> None:
        self._room, self._half = room, half
        self._items: list[_Item] = []
        self._held = 0

    def append(self, value: Any) -> None:
        """Adds a value. Raises UnknownValueError, of `tspc.traversal.nested`, if it cannot be kept."""
        found: list[Tensor] = []

        def take(tensor: Tensor) -> _Slot:
            found.append(tensor.detach())
            return _Slot(len(found) - 1)

        shell = mapped(value, take)
        kept = [_kept(tensor, self._half) for tensor in found]
        narrow = [own.dtype != tensor.dtype for own, tensor in zip(kept, found, strict=True)]
        shapes = tuple(t.shape for t in kept)
        size = sum(t.numel() * t.element_size() for t in kept if _is_plain(t))
        if self._room.take(size):
            self._held += size
            self._items.append(_Item(shell, list(kept), narrow, None, shapes))
            return
        file = self._room.write([t if _is_plain(t) else None for t in kept])
        self._items.append(_Item(shell, [None if _is_plain(t) else t for t in kept], narrow, file, shapes))

    def shapes(self, number: int) -> tuple[torch.Size, ...]:
        """Shapes of the tensors of a value; the value is not read."""
        return self._items[number].shapes

    def __getitem__(self, number: int) -> Any:
        return self._items[number].read()

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __len__(self) -> int:
        return len(self._items)

    def clear(self) -> None:
        for item in self._items:
            if item.file is not None:
                item.file.unlink()
        self._room.take(-self._held)
        self._items, self._held = [], 0


def _is_plain(tensor: Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return type(tensor) in (Tensor, nn.Parameter) and is_dense


def _kept(tensor: Tensor, half: bool) -> Tensor:
    """The tensor in the form that is kept. A view is copied, because it would hold (or write) its whole base."""
    if not _is_plain(tensor):
        return tensor
    if half and tensor.dtype == torch.float32 and _fits_half(tensor):
        return tensor.half()
    is_view = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if is_view else tensor


def _fits_half(tensor: Tensor) -> bool:
    """Whether float16 can hold the tensor: no value overflows, and no value that matters becomes zero."""
    sizes = tensor.abs()
    largest = float(sizes.where(sizes.isfinite(), 0).amax()) if tensor.numel() else 0.0
    return largest == 0 or LEAST <= largest <= torch.finfo(torch.float16).max
