"""Where a phase stands, on disk: after a kill the same command goes on from there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tspc import processes
from tspc.files import write_atomically
from tspc.launch import is_first


class Progress:
    """The last saved state of a phase, and the one before it, which stands in for a damaged one.

    The files belong to one set of `settings`; those of others are ignored. `interval` is the least time between two
    saves, in seconds. `warning` says that the newest state could not be read. Nothing is kept without a path.
    """

    def __init__(self, path: Path | None = None, settings: str = "", interval: float = 60.0) -> None:
        self.path, self.settings, self.interval = path, settings, interval
        self.warning: str | None = None
        self._started = self._saved = time.monotonic()
        self._state = processes.by_first(self._read)
        self._seconds_before = self._state["seconds"] if self._state else 0.0

    @property
    def stage(self) -> int:
        """Number of the first stage (block, for distillation) that is not finished."""
        return self._state["stage"] if self._state else 0

    @property
    def seconds(self) -> float:
        """Time spent on the phase, earlier processes included."""
        return self._seconds_before + time.monotonic() - self._started

    def state_of(self, stage: int) -> dict[str, Any] | None:
        """What was saved last, if it lies in this stage."""
        return self._state["state"] if self._state is not None and self._state["stage"] == stage else None

    @property
    def is_due(self) -> bool:
        """Whether the time between two saves has passed."""
        return self.path is not None and time.monotonic() - self._saved >= self.interval

    def save(self, stage: int, state: dict[str, Any]) -> None:
        """Raises RunError if the disk is full or the like; what was saved before is still there then."""
        self._saved = time.monotonic()
        if self.path is None or not is_first():
            return
        found = {"settings": self.settings, "stage": stage, "seconds": self.seconds, "state": state}
        write_atomically(self.path, lambda path: torch.save(found, path), keep_as=_previous(self.path))

    @staticmethod
    def discard(path: Path) -> None:
        """Removes what was saved there."""
        if is_first():
            path.unlink(missing_ok=True)
            _previous(path).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        if self.path is None:
            return None
        for path in (self.path, _previous(self.path)):
            if not path.is_file():
                continue
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # a damaged zip file raises nearly anything
                self.warning = f"{path} is damaged; going on from the state before it, if there is one"
                path.unlink()  # or it would take the place of the good one at the next save
                continue
            if isinstance(found, dict) and found.get("settings") == self.settings:
                return found
        return None


def _previous(path: Path) -> Path:
    return path.with_name(f"previous.{path.name}")
