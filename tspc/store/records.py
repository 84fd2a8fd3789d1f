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


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`key: old → new` for every value in which two plain structures differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    return [] if old == new else [f"{where}: {old} → {new}"]


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
