"""A run's directory: named by what it computes, locked while in use, refused if it holds something else."""

from __future__ import annotations

import fcntl  # not filelock: the pages test the same lock with a shared one, on a file that may be read-only
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tspc.errors import RunError
from tspc.store.files import read_json, remove, remove_left_over, write_json
from tspc.store.records import FAILED, FIGURES, HANDED_OVER, differences, failure, read_metrics
from tspc.system import processes
from tspc.system.launch import is_first

RESULTS = ("*.safetensors", "*.progress.pt", "accuracy-*.json", "curves-*.json", "result.json")
"""What a directory holds of a run, apart from its history and from what it is told of."""


class RunDirectory:
    """Use as a context manager: creates and locks the directory, checks its identity, opens the log.

    `identity` is plain data on which everything in the directory depends, and `defaults` has the values of keys that an
    earlier version did not write. If the directory holds results of this identity, `run.json` stays as it was. If it
    holds others, it is refused, or with `overwrite` the results are removed. If it is in use, it is refused; with
    `on_wait` this function is called once, and then the lock is awaited. `elsewhere` is the advice on how to keep both
    runs. `leaves` are the patterns of further files that are results. Raises RunError if the directory is refused or
    cannot be written.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        overwrite: bool = False,
        on_wait: Callable[[], None] | None = None,
        elsewhere: str = "variant=NAME or another output_dir",
        leaves: Sequence[str] = (),
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.identity, self.overwrite = path, identity, overwrite
        self.asked, self._defaults = identity, defaults
        self._on_wait, self._elsewhere = on_wait, elsewhere
        self._patterns = (*RESULTS, *leaves)
        self._created: list[Path] = []
        self._lock_descriptor: int | None = None
        self._handler: logging.FileHandler | None = None

    def __enter__(self) -> RunDirectory:
        self.identity = processes.by_first(self._open)
        return self

    def _open(self) -> dict[str, Any]:
        try:
            self._created = self._create()
            try:
                self._lock()
                identity = self._claim()
                self._open_log()
                return identity
            except BaseException:
                self._undo()
                raise
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"cannot write into {self.path}: {reason}; choose another output_dir") from error

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not is_first():
            return
        if kind is not None and not self._results() and not self.file("metrics.jsonl").exists():
            self._undo()
        else:
            with suppress(RunError):  # a full disk; the error on its way says so
                self._note_end(value)
        self._close()

    def _note_end(self, error: BaseException | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, RunError):  # a refusal, or the disk's fault
            self.note({"event": FAILED, "error": " ".join(str(error).split())})
        elif error is None and failure(read_metrics(self.path)) is not None:
            self.note({"event": "end"})  # of a command without an event of its own: the failure is over

    def file(self, name: str) -> Path:
        return self.path / name

    def note(self, record: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if not is_first():
            return
        try:
            with self.file("metrics.jsonl").open("ab+") as file:
                # A full disk, or a kill, may have left half a line.
                is_cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
                file.write(b"\n" * is_cut + json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise RunError(f"cannot write {self.file('metrics.jsonl')}: {error.strerror}") from error

    @property
    def lines(self) -> int:
        """The number of lines in `metrics.jsonl`."""
        path = self.file("metrics.jsonl")
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def held_by_another(self) -> list[str]:
        """The differences between this identity and that of the results in the directory; empty without results.

        Raises RunError if it cannot be read, unless `overwrite` is set.
        """
        path = self.file("run.json")
        if not os.path.exists(path) or not self._results():
            return []
        try:
            return differences(read_json(path, dict), self.asked, defaults=self._defaults)
        except RunError as error:
            if self.overwrite:
                return [str(error)]
            raise

    def _results(self) -> list[Path]:
        return [path for pattern in self._patterns for path in self.path.glob(pattern)]

    def _create(self) -> list[Path]:
        """Makes the directory; returns the ones that did not exist, innermost first."""
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        return missing

    def _lock(self) -> None:
        descriptor = os.open(self.file(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._on_wait is None:
                owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise RunError(f"{self.path} is in use by another run (process {owner}); wait for it to end") from None
            self._on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._lock_descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)

    def _claim(self) -> dict[str, Any]:
        """Writes the identity of the directory, and returns it."""
        changed = self.held_by_another()
        if changed and not self.overwrite:
            raise RunError(
                f"{self.path} holds another run ({'; '.join(changed)}); pass {self._elsewhere} "
                "to keep both, or overwrite=true to redo it"
            )
        path = self.file("run.json")
        identity = self.asked if changed or not self._results() or not path.exists() else read_json(path, dict)
        # The old results are removed before the new identity is written, so a kill between leaves no wrong identity.
        for outdated in self._results() if changed else []:
            remove(outdated)
        write_json(path, identity)
        for handed in self.path.glob(f"*{HANDED_OVER}"):
            remove(handed)
        folders = dict.fromkeys(("", FIGURES, *(os.path.dirname(pattern) for pattern in self._patterns)))
        remove_left_over(*map(self.file, folders))
        return identity

    def _open_log(self) -> None:
        self._handler = logging.FileHandler(self.file("tspc.log"))
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        # A full disk shows when a result is written; the log need not add a traceback for each line.
        self._handler.handleError = lambda record: None
        logger = logging.getLogger("tspc")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self._handler)
        logging.getLogger("py.warnings").addHandler(self._handler)

    def _close(self) -> None:
        if self._handler is not None:
            for name in ("tspc", "py.warnings"):
                logging.getLogger(name).removeHandler(self._handler)
            try:
                self._handler.close()
            except OSError:
                self._handler = None  # nothing more to lose: the disk is full, and an error is on its way
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def _undo(self) -> None:
        """Removes what this run has created; files of a run that holds the lock are not touched."""
        if self._lock_descriptor is not None and self.path in self._created:
            for name in (".lock", "tspc.log", "run.json"):
                self.file(name).unlink(missing_ok=True)
        self._close()
        for path in self._created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
