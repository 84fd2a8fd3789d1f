"""A run's directory: named by what it computes, locked while in use, refused if it holds something else."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tspc.errors import RunError
from tspc.files import PARTIAL, read_json, write_json


def fingerprint(data: Any) -> str:
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One `key: old → new` for every leaf in which two plain structures differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    return [] if old == new else [f"{where}: {old} → {new}"]


class RunDirectory:
    """Use as a context manager: creates and locks the directory, checks its identity, opens the log.

    `identity` is plain data that everything in the directory depends on. Raises RunError if the directory
    is in use, cannot be written, or belongs to another identity and `overwrite` is not set. `on_wait`, where
    given, is called once and the lock awaited instead of refused.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], overwrite: bool = False, on_wait: Callable[[], None] | None = None
    ) -> None:
        self.path, self.identity, self.overwrite, self._on_wait = path, identity, overwrite, on_wait

    def __enter__(self) -> RunDirectory:
        created = self._create()
        try:
            self._lock()
            self._check_identity()
            for left_over in self.path.glob(f".*{PARTIAL}"):
                left_over.unlink()
            self._open_log()
        except BaseException as error:
            self._undo(created)
            if isinstance(error, OSError):
                raise RunError(f"cannot write into {self.path}: {error.strerror or error}") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def file(self, name: str) -> Path:
        return self.path / name

    def note(self, record: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        try:
            with self.file("metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.file('metrics.jsonl')}: {error.strerror}") from error

    def _create(self) -> list[Path]:
        """Makes the directory; returns the ones that did not exist, innermost first."""
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot create {self.path}: {error.strerror or error}; choose another output_dir"
            ) from error
        return missing

    def _lock(self) -> None:
        self._lock_file = self.file(".lock").open("a+")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._on_wait is None:
                self._lock_file.seek(0)
                owner = self._lock_file.read().strip() or "unknown"
                raise RunError(f"{self.path} is in use by another run (process {owner}); wait for it to end") from None
            self._on_wait()
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        self._lock_file.truncate(0)
        self._lock_file.write(str(os.getpid()))
        self._lock_file.flush()

    def _check_identity(self) -> None:
        path = self.file("run.json")
        if path.exists() and not self.overwrite:
            changed = differences(read_json(path), self.identity)
            if changed:
                raise RunError(
                    f"{self.path} holds another run ({'; '.join(changed)}); "
                    "pass another output_dir, or overwrite=true to redo it"
                )
            return
        write_json(path, self.identity)

    def _open_log(self) -> None:
        self._handler = logging.FileHandler(self.file("tspc.log"))
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("tspc")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self._handler)

    def _close(self) -> None:
        handler = getattr(self, "_handler", None)
        if handler is not None:
            logging.getLogger("tspc").removeHandler(handler)
            handler.close()
        lock_file = getattr(self, "_lock_file", None)
        if lock_file is not None:
            lock_file.close()

    def _undo(self, created: list[Path]) -> None:
        """Leaves the disk as it was found."""
        self._close()
        if self.path in created:
            for name in (".lock", "tspc.log", "run.json"):
                self.file(name).unlink(missing_ok=True)
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
