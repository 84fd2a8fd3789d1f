"""Plain data about a run, on disk: settings, fingerprints, metrics, interrupted phases."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tspc.store.schemas import METRICS, problem

HANDED_OVER = ".shared.safetensors"
"""Ending of the file by which the first of several processes hands a network over to the others."""

FIGURES = "figures"
"""The folder beside a page; it holds the page's figures as PNG and SVG."""

FAILED = "failed"
"""The event in `metrics.jsonl` at the end of a command that failed."""


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass as plain data, as JSON would return it."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def fingerprint(data: Any) -> str:
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def usual(settings: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass that have a default, as plain data."""
    fields = [field for field in dataclasses.fields(settings) if field.init]
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return json.loads(json.dumps(defaults | made))


def differences(old: Any, new: Any, where: str = "", defaults: Any = None) -> list[str]:
    """`key: old → new` for every value in which two plain structures differ.

    A key that one of them does not have stands for its value in `defaults`, or None. So records stay valid when a later
    version has a key more.
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{where}: {old} → {new}"]
    known = defaults if isinstance(defaults, dict) else {}
    found: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        default, name = known.get(key), f"{where}.{key}" if where else key
        found += differences(old.get(key, default), new.get(key, default), name, default)
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, without damaged lines; empty if there is no such file."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):  # a run that is being written, or was killed, ends in half a line
            record = json.loads(line)
            if problem(record, METRICS) is None:
                records.append(record)
    return records


def failure(metrics: list[dict[str, Any]]) -> str | None:
    """Why the last command failed; None if it did not fail."""
    last = next((record for record in reversed(metrics) if "event" in record), {})
    if last.get("event") != FAILED:
        return None
    return str(last.get("error") or "for a reason that is not noted")


def flattened(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level; the keys are names with dots."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
