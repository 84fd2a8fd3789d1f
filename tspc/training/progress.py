"""The saved state of a phase, on disk; after a kill the same command goes on from there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import nn

from tspc.errors import RunError
from tspc.store.files import remove, write_atomically
from tspc.store.schemas import COUNT, SECONDS, problem
from tspc.system import processes
from tspc.system.launch import is_first

_SAVED = {"settings": str, "stage": COUNT, "seconds": SECONDS}
"""The entries of a saved state besides the tensors."""


class Progress:
    """The last saved state of a phase, and the one before it, in case the last one is damaged.

    The files belong to one set of `settings`; files of other settings are ignored. `interval` is the least time between
    two saves, in seconds. `warning` says that the newest state could not be read. Without a path nothing is saved.
    """

    def __init__(self, path: Path | None = None, settings: str = "", interval: float = 60.0) -> None:
        self.path, self.settings, self.interval = path, settings, interval
        self.warning: str | None = None
        self._started = self._saved = time.monotonic()
        self._state = processes.by_first(self._read)
        self._seconds_before = self._state["seconds"] if self._state else 0.0

    @property
    def part(self) -> int:
        """Number of the first part of the phase (block, for distillation) that is not finished."""
        return self._state["stage"] if self._state else 0

    @property
    def seconds(self) -> float:
        """Time spent on the phase, earlier processes included."""
        return self._seconds_before + time.monotonic() - self._started

    def state_of(self, part: int) -> dict[str, Any] | None:
        """The last saved state, if it belongs to this part."""
        return self._state["state"] if self._state is not None and self._state["stage"] == part else None

    def restore_(self, network: nn.Module) -> None:
        """Loads the saved weights into the network, if there are any. Raises RunError if they do not fit."""
        if (state := self.state_of(self.part)) is not None:
            with self.restoring():
                network.load_state_dict(state["network"])

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """A context in which a saved state is loaded. Raises RunError if the state is not of this training."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"{self.path} holds no state of this training ({why}); remove it, and begin anew") from error

    def is_under_way(self, part: int = 0) -> bool:
        """Whether training goes on from a saved step of this part, with the weights of that step."""
        return "step" in (self.state_of(part) or {})

    @property
    def is_due(self) -> bool:
        """Whether the time between two saves has passed."""
        return self.path is not None and time.monotonic() - self._saved >= self.interval

    def save(self, part: int, state: dict[str, Any]) -> None:
        """Saves a state. Raises RunError if that fails, for example on a full disk; the older state is then kept."""
        self._saved = time.monotonic()
        if self.path is None or not is_first():
            return
        found = {"settings": self.settings, "stage": part, "seconds": self.seconds, "state": state}
        write_atomically(self.path, lambda path: torch.save(found, path), keep_as=_previous(self.path))

    @staticmethod
    def discard(path: Path) -> None:
        """Removes what was saved there."""
        if is_first():
            remove(path)
            remove(_previous(path))

    def _read(self) -> dict[str, Any] | None:
        if self.path is None:
            return None
        for path in (self.path, _previous(self.path)):
            if not path.is_file():
                continue
            found: Any = None
            try:
                with ZipFile(path) as archive:  # torch does not look at the checksums
                    is_whole = archive.testzip() is None
                found = torch.load(path, map_location="cpu", weights_only=True)
                is_whole = is_whole and isinstance(found["state"], dict)
                is_whole = is_whole and problem({key: found[key] for key in _SAVED}, _SAVED) is None
            except Exception:  # a damaged zip file raises nearly anything
                is_whole = False
            if not is_whole:
                self.warning = f"{path} is damaged; going on from the state before it, if there is one"
                remove(path)  # or it would take the place of the good one at the next save
            elif found["settings"] == self.settings:
                return found
        return None


def _previous(path: Path) -> Path:
    return path.with_name(f"previous.{path.name}")
