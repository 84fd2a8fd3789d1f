"""Files that are either whole or absent: written to a temporary file, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tspc.errors import RunError
from tspc.store.schemas import DEEPEST, problem
from tspc.system.launch import is_first

DISK_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
}
"""The system's error numbers for a full or broken disk, or a folder without permission."""

PARTIAL = ".partial"
"""Ending of the temporary files; a file that a killed process left can be removed."""


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
        reason, full = why_unwritten(error, temporary)
        remedy = "; free some space and run the same command again, it goes on from what was saved before"
        raise RunError(f"cannot write {path}: {reason}{remedy if full else ''}") from error
    finally:
        temporary.unlink(missing_ok=True)


def why_unwritten(error: BaseException, path: Path) -> tuple[str, bool]:
    """Why writing `path` failed with `error`, and whether for lack of space.

    safetensors and torch.save raise exceptions of their own, torch.save without the system's reason. The reason is
    found by writing more at the end of the file, which the caller removes afterwards.
    """
    told = re.search(r"\(os error (\d+)\)", str(error))
    code = int(told.group(1)) if told else getattr(error, "errno", None)
    if code is None:
        try:
            with path.open("ab") as file:
                file.write(bytes(2**16))
                os.fsync(file.fileno())
        except OSError as probed:
            code = probed.errno
    lines = str(error).splitlines() or [type(error).__name__]
    return (lines[0] if code is None else os.strerror(code)), code in (errno.ENOSPC, errno.EDQUOT)


def _sync_directory(directory: Path) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # Windows opens no directories, and needs none to be synced
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """`data` as indented JSON, atomically."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, atomically; half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode(errors="replace")))


def parsed_json(text: str | bytes, schema: Any = (dict, list)) -> Any:
    """The JSON in `text`. Raises ValueError if it is damaged, nested too deeply, or does not fit the schema."""
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"deeper than {DEEPEST} levels") from error
    wrong = problem(data, schema)
    if wrong is not None:
        raise ValueError(wrong)
    return data


def read_json(path: Path, schema: Any = (dict, list)) -> Any:
    """The JSON in `path`. Raises RunError if it is no file, damaged, or does not fit the schema (see `schemas`)."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        return parsed_json(path.read_bytes(), schema)
    except (OSError, ValueError) as error:
        wrong = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot read {path}: {wrong}; remove it, or pass overwrite=true") from error


def intact(path: Path, schema: Any) -> Any:
    """The JSON in `path`; None if there is none or it does not fit the schema, so that the caller makes it anew."""
    with suppress(RunError):
        return read_json(path, schema) if path.exists() else None
    return None


def make_folder(path: Path, remedy: str = "choose another output_dir") -> None:
    """Makes a folder and its parents. Raises RunError, with the remedy, if it cannot be made."""
    if not is_first():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {path}: {error.strerror}; {remedy}") from error


def remove(path: Path) -> None:
    """Removes a file if it exists. Raises RunError if that fails, for example if it is a folder."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot remove {path}: {error.strerror}; move it away") from error


def remove_left_over(*folders: Path) -> None:
    """Removes the temporary files that killed processes left in these folders."""
    for path in (path for folder in folders for path in folder.glob(f".*{PARTIAL}*")):
        # Those of a living process may be about to get their names; this one has none open yet.
        writer = re.search(rf"\.(\d+){re.escape(PARTIAL)}", path.name)
        if writer is not None and _is_another_alive(int(writer.group(1))):
            continue
        with suppress(OSError):  # somebody else's
            path.unlink()


def _is_another_alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's
    return True
