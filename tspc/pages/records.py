"""Reads the files of a run for the pages: plain data, and nothing is computed again."""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tspc.compression.goals import bits_of, goal_of
from tspc.compression.plan import Plan
from tspc.errors import RunError, TspcError
from tspc.pages.goals import ERROR, goal_in, kind_of_goal
from tspc.phases.finished import read_record, unfinished
from tspc.phases.table import NETWORK_PHASES
from tspc.store.files import read_json
from tspc.store.records import FAILED, failure, read_metrics
from tspc.store.schemas import IDENTITY, JOB, RESULT, SPECTRA
from tspc.store.scores import TOP1, Scale, scale_in, scale_of

REFERENCE = "reference"
DONE, RUNNING, STOPPED, DAMAGED = "done", "running", "stopped", "damaged"

DAMAGES = (TspcError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""Errors of a run with records that were changed by hand; the schemas find nearly all of them before."""


@dataclass(frozen=True)
class Run:
    """One run's directory. `identity` is `run.json`; `result` is `result.json`, None before the end of the first phase.

    `status` is done, running (the directory is locked), failed (with `error`), or stopped (the run has no result, or a
    later phase is not finished).
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
        """The method and the settings in the directory's name, without the goal; runs of one curve share it.

        A size is told by the word only: there the plan chooses the widths, and with a rate it does not.
        """
        head, name = f"{self.method}-{self.goal}", self.path.parent.name
        kind = f"-{kind_of_goal(self.goal)}" if kind_of_goal(self.goal) not in ("", ERROR) else ""
        return self.method + kind + (name.removeprefix(head) if name.startswith(head) else "")  # it may be renamed

    @property
    def goal(self) -> str:
        """The rate, size, target error or width that the user gave, as in the directory's name."""
        return goal_of(self.identity)

    @property
    def bits(self) -> str:
        """The width of the factors' entries that the user gave: "32", "8", …, or "auto"."""
        return bits_of(self.identity)

    @property
    def scale(self) -> Scale:
        """How the numbers of the run's metric are read."""
        measured = (self.result or {}).get("accuracy")
        return scale_of(self.identity.get("metric", TOP1)) if measured is None else scale_in(measured)

    @property
    def dataset(self) -> str:
        return self.identity["dataset"]["name"]

    @property
    def network(self) -> str:
        return self.identity["network"]["name"]

    @property
    def inputs(self) -> str:
        """What the network takes, in the words of a page."""
        return "inputs" if "task" in self.identity["dataset"] else "images"

    @cached_property
    def _found(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], list[str]]:
        """Phases, spectra, and problems of files that cannot be read; a page shows what can be read."""
        phases, spectra, problems = {}, [], []
        for phase in NETWORK_PHASES:
            path = self.path / f"{phase}.safetensors"
            try:
                if path.exists():
                    phases[phase] = read_record(path)
            except DAMAGES as error:
                problems.append(str(error))
        path = self.path / "spectra.json"
        try:
            spectra = read_json(path, SPECTRA) if path.exists() else []
        except DAMAGES as error:
            problems.append(str(error))
        return phases, spectra, problems

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        """The data of each finished phase, from the header of its checkpoint."""
        return self._found[0]

    @property
    def spectra(self) -> list[dict[str, Any]]:
        return [spectrum for spectrum in self._found[1] if spectrum["values"]]

    @property
    def problems(self) -> list[str]:
        """Why the page does not show some files of the directory."""
        return self._found[2]

    @cached_property
    def plan(self) -> Plan | None:
        plan = self.phases.get("decompose", {}).get("plan")
        return None if plan is None else Plan.from_dict(plan)

    @cached_property
    def reference_metrics(self) -> list[dict[str, Any]]:
        """The training curve of the reference, if a run trained it."""
        return read_metrics(self.path.parent.parent / REFERENCE)

    @property
    def benchmark(self) -> dict[str, Any]:
        """The results of `phase=benchmark` for this state of the network; empty if there are none."""
        return (self.result or {}).get("benchmark") or {}


@dataclass(frozen=True)
class Broken:
    """A run that cannot be shown, and why: a failed job without a directory, or a run with damaged files."""

    label: str
    error: str
    status: str = FAILED
    method: str = ""
    goal: str = ""


def _failed(overrides: list[str], error: str) -> Broken:
    """A job without a directory; method and rate come from its command."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    label = " ".join(overrides) or "(defaults)"
    return Broken(label, error, method=given.get("method", ""), goal=goal_in(given))


def damaged(path: Path, error: BaseException) -> Broken:
    """A run with records that cannot be read; `error` is one of DAMAGES."""
    what = str(error) if isinstance(error, TspcError) else f"{type(error).__name__}: {error}"
    return Broken(path.parent.name, f"{path} is damaged or incomplete ({what})", DAMAGED)


def read_run(path: Path) -> Run | None:
    """The run in a directory; None if it holds none. Raises RunError if its files are damaged."""
    description = path / "run.json"
    if not description.exists():
        return None
    identity = read_json(description, dict)
    if "method" not in identity:  # a reference network
        return None
    identity = read_json(description, IDENTITY)
    result = read_json(path / "result.json", RESULT) if (path / "result.json").exists() else None
    metrics = read_metrics(path)
    error = failure(metrics)
    if error is not None:
        status = FAILED
    elif result is not None and unfinished(path) is None:
        status = DONE
    else:
        status = RUNNING if _is_locked(path / ".lock") else STOPPED
    return Run(path, identity, result, metrics, status, error)


def find_runs(pattern: str) -> list[Run | Broken]:
    """All runs below the matches of a wildcard (`**` for any depth), and the failed jobs of a sweep's folder.

    Raises RunError if there are none.
    """
    folder, rest = split_pattern(pattern)
    matches = [""] if rest in ("", "**") else glob.glob(rest, root_dir=folder, recursive=True)
    found: dict[Path, Run | Broken] = {}
    for top in _topmost(folder / name for name in matches):
        found |= _read_all(description.parent for description in sorted(top.rglob("run.json")))
        found |= _read_jobs(top)
    if not found:
        raise RunError(f"runs={pattern}: no run there; name a folder of runs, for example runs='outputs/**'")
    return list(found.values())


def read_sweep(folder: Path) -> list[Run | Broken]:
    """The runs of a sweep, and its jobs that left no run; `folder` holds the sweep's records."""
    return list(_read_jobs(folder).values())


def _read_jobs(folder: Path) -> dict[Path, Run | Broken]:
    """The jobs, by the run's directory, or by the job's record if there is no directory."""
    found: dict[Path, Run | Broken] = {}
    for path in sorted(folder.glob("job-*.json")):
        try:
            record = read_json(path, JOB)
            if record["result"] is None:
                found[path.resolve()] = _failed(record["overrides"], record["error"] or "it left no result")
            else:
                found |= _read_all([_located(Path(record["result"]["directory"]), folder)])
        except DAMAGES as error:
            found[path.resolve()] = damaged(path, error)
    return found


def _read_all(directories: Iterable[Path]) -> dict[Path, Run | Broken]:
    found: dict[Path, Run | Broken] = {}
    for directory in directories:
        try:
            run = read_run(directory)
        except DAMAGES as error:
            run = damaged(directory, error)
        if run is not None:
            found[directory.resolve()] = run
    return found


def split_pattern(pattern: str) -> tuple[Path, str]:
    """The folder where a wildcard starts, and the rest of it. An existing path of this name is no wildcard."""
    folder, parts = Path(), list(Path(pattern).parts)
    while parts and (not glob.has_magic(parts[0]) or (folder / parts[0]).exists()):
        folder /= parts.pop(0)
    return folder, str(Path(*parts)) if parts else ""


def _located(directory: Path, folder: Path) -> Path:
    """A run's directory as its record names it: relative to where the sweep started, or to a parent of its folder."""
    tops = [Path(), *folder.absolute().parents]
    return next((top / directory for top in tops if (top / directory).is_dir()), directory)


def _topmost(paths: Any) -> list[Path]:
    folders = sorted({path for path in paths if path.is_dir()})
    return [path for path in folders if not set(path.parents) & set(folders)]


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
