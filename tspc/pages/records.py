"""What a run left in its directory, read back for the pages: plain data, nothing computed anew."""

from __future__ import annotations

import fcntl
import glob
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tspc import checkpoint
from tspc.errors import RunError, WeightsError
from tspc.files import read_json
from tspc.plans import Plan
from tspc.runs import STAGES

REFERENCE = "reference"
DONE, RUNNING, FAILED, STOPPED = "done", "running", "failed", "stopped"


@dataclass(frozen=True)
class Run:
    """One run's directory. `identity` is `run.json`; `result` is `result.json`, None before the first phase's end.

    `status` is done, running (its directory is locked), failed (with `error`), or stopped before it had a result.
    """

    path: Path
    identity: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]] = field(repr=False)
    status: str = DONE
    error: str | None = None

    @property
    def method(self) -> str:
        return self.identity["method"]["name"]

    @property
    def series(self) -> str:
        """The method with the settings in the directory's name, without the rate: what a curve over rates shares."""
        head = f"{self.method}-{self.goal}"
        return self.method + self.path.parent.name.removeprefix(head)

    @property
    def goal(self) -> str:
        """The rate or the target error asked for, as in the directory's name."""
        target = self.identity.get("target_error")
        return f"{self.identity['rate']:g}" if target is None else f"error{target:g}"

    @property
    def dataset(self) -> str:
        return self.identity["dataset"]["name"]

    @property
    def network(self) -> str:
        return self.identity["network"]["name"]

    @cached_property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What each finished phase wrote into the header of its checkpoint."""
        found = {}
        for stage in STAGES:
            path = self.path / f"{stage}.safetensors"
            if path.exists():
                try:
                    found[stage] = checkpoint.read_header(path)["info"]
                except WeightsError:
                    continue  # a damaged file is the run's business; the page shows what there is
        return found

    @cached_property
    def plan(self) -> Plan | None:
        plan = self.stages.get("decompose", {}).get("plan")
        return None if plan is None else Plan.from_dict(plan)

    @cached_property
    def spectra(self) -> list[dict[str, Any]]:
        path = self.path / "spectra.json"
        return read_json(path) if path.exists() else []

    @cached_property
    def reference_metrics(self) -> list[dict[str, Any]]:
        """How the reference was trained, where it was trained here."""
        return _metrics(self.path.parent.parent / REFERENCE)

    @property
    def benchmark(self) -> dict[str, Any]:
        """What `phase=benchmark` measured; empty where it has not."""
        path = self.path / "benchmark.json"
        kept = read_json(path) if path.exists() else {}
        return (self.result or {}).get("benchmark") or kept


@dataclass(frozen=True)
class FailedJob:
    """A job of a sweep that left no directory: what was asked, and why it failed."""

    overrides: list[str]
    error: str


def read_run(path: Path) -> Run | None:
    """The run in a directory; None if it holds none. Raises RunError if its files are damaged."""
    description = path / "run.json"
    if not description.exists():
        return None
    identity = read_json(description)
    if "method" not in identity:  # a reference network
        return None
    result = read_json(path / "result.json") if (path / "result.json").exists() else None
    metrics = _metrics(path)
    last = next((record for record in reversed(metrics) if "event" in record), {})
    error = last["error"] if last.get("event") == FAILED else None
    if error is not None:
        status = FAILED
    elif result is not None:
        status = DONE
    else:
        status = RUNNING if _is_locked(path / ".lock") else STOPPED
    return Run(path, identity, result, metrics, status, error)


def find_runs(pattern: str) -> tuple[list[Run], list[FailedJob]]:
    """All runs below what a wildcard matches (`**` for any depth), and the failed jobs of a sweep's folder.

    Raises RunError if there are none.
    """
    runs: dict[Path, Run] = {}
    failed: list[FailedJob] = []
    for folder in _topmost(Path(name) for name in glob.glob(pattern, recursive=True)):
        for description in sorted(folder.rglob("run.json")):
            run = read_run(description.parent)
            if run is not None:
                runs[run.path.resolve()] = run
        sweep_runs, sweep_failed = read_sweep(folder)
        runs |= {run.path.resolve(): run for run in sweep_runs}
        failed += sweep_failed
    if not runs and not failed:
        raise RunError(f"runs={pattern}: no run there; name a folder of runs, for example runs='outputs/**'")
    return list(runs.values()), failed


def read_sweep(folder: Path) -> tuple[list[Run], list[FailedJob]]:
    """The runs of the sweep whose records `folder` holds, and its jobs that left none."""
    runs, failed = [], []
    for path in sorted(folder.glob("job-*.json")):
        record = read_json(path)
        if record["result"] is None:
            failed.append(FailedJob(record["overrides"], record["error"]))
            continue
        run = read_run(_located(Path(record["result"]["directory"]), folder))
        if run is not None:
            runs.append(run)
    return runs, failed


def fixed_part(pattern: str) -> Path:
    """The folder that a wildcard starts from: its part before the first special character."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folder = Path(*parts[:fixed]) if fixed else Path()
    return folder if folder.is_dir() else folder.parent


def _located(directory: Path, folder: Path) -> Path:
    """A run's directory as its record names it: from where the sweep was started, or from above its folder."""
    tops = [Path(), *folder.absolute().parents]
    return next((top / directory for top in tops if (top / directory).is_dir()), directory)


def _topmost(paths: Any) -> list[Path]:
    folders = sorted({path for path in paths if path.is_dir()})
    return [path for path in folders if not set(path.parents) & set(folders)]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run that is being written, or was killed
    return records


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
