"""Files that are either whole or absent: write beside, sync, rename."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tspc.errors import RunError
from tspc.launch import is_first

PARTIAL = ".partial"
"""Ending of the temporary files; one that a killed process left behind can be removed."""


_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], object], keep_as: Path | None = None) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it; an older file survives any failure.

    With `keep_as` the older file is kept under that name. Of several processes only the first one writes. Raises
    RunError, naming the file and the cause, if it cannot be written (no space, no permission).
    """
    if not is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # safetensors makes its files private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            path.replace(keep_as)
        temporary.replace(path)
        _sync_directory(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors and torch.save wrap a full disk in exceptions of their own.
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"cannot write {path}: {reason}{_remedy(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _remedy(error: BaseException) -> str:
    """What to do about a full disk; nothing was lost."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return "; free some space and run the same command again, it goes on from what was saved before" if full else ""


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """`data` as indented JSON, atomically."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> Any:
    """The JSON in `path`. Raises RunError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}; remove it, or pass overwrite=true") from error
