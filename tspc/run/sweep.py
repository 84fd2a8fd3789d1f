"""The end of a sweep: a table of all its jobs. Imports nothing heavy, because Hydra loads it before any job."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tspc.system.launch import is_first

_FOLDER = "TSPC_SWEEP_DIR"
"""The environment variable with the folder for the sweep's records. Jobs in other processes read it, too."""

_made_by_sweep: list[Path] = []
"""The folders that Hydra makes for the sweep, innermost first."""


def sweep_folder(default: str) -> Path:
    """The folder for the records of the jobs. It is one folder, also if the sweep varies `output_dir`."""
    return Path(os.environ.get(_FOLDER, default))


def write_record(
    folder: Path, job: int, overrides: list[str], result: dict[str, Any] | None, error: str | None
) -> None:
    """Writes a record of what a job did. The end of the sweep reads the records of all jobs."""
    from tspc.store.files import write_json

    record = {"job": job, "overrides": overrides, "result": result, "error": error}
    write_json(folder / f"job-{job:04d}.json", record)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records that can be read. A record may be incomplete, for example of another sweep in the same folder."""
    from tspc.store.files import intact
    from tspc.store.schemas import JOB

    records = [intact(path, JOB) for path in sorted(folder.glob("job-*.json"))]
    return [record for record in records if record is not None]


def forget_empty_sweep() -> None:
    """Removes the folder of a sweep that failed before its first job."""
    folder = Path(os.environ.pop(_FOLDER, ""))
    if not _made_by_sweep or read_records(folder):
        return
    with suppress(OSError):  # stops at a folder that does not exist or is not empty
        (folder / "multirun.yaml").unlink(missing_ok=True)
        for path in _made_by_sweep:
            path.rmdir()


class SweepTable(Callback):
    """When a sweep ends, prints a row for each job. If a job failed, the process then fails, too."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).absolute()
        os.environ[_FOLDER] = str(folder)
        _made_by_sweep[:] = [path for path in (folder, *folder.parents) if not path.exists()]

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from tspc.pages import made, write_sweep
        from tspc.terminal.display import Display
        from tspc.terminal.tables import sweep_table

        folder = sweep_folder(config.hydra.sweep.dir)
        records = read_records(folder)
        if not records:
            return
        del os.environ[_FOLDER]
        display = Display(is_silent=not is_first(), verbosity=config.verbosity)
        display.show(sweep_table(records))
        display.line(f"records of the jobs in {os.path.relpath(folder)}")
        if is_first():
            made(lambda: write_sweep(folder), display)
        if any(record["error"] for record in records):
            sys.exit(1)
