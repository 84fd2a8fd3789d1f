"""The end of a sweep: a table of all its jobs. Imports nothing heavy, for Hydra loads it before any job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


def write_record(
    folder: Path, job: int, overrides: list[str], result: dict[str, Any] | None, error: str | None
) -> None:
    """Leaves what a job did where the end of the sweep finds it, whichever process ran it."""
    record = {"job": job, "overrides": overrides, "result": result, "error": error}
    (folder / f"job-{job:04d}.json").write_text(json.dumps(record, indent=2) + "\n")


def read_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]


class SweepTable(Callback):
    """Prints one row a job when a sweep ends; the process then fails if a job did."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from tspc.display import Display
        from tspc.report import sweep_table

        folder = Path(config.hydra.sweep.dir)
        records = read_records(folder)
        if not records:
            return
        display = Display()
        display.show(sweep_table(records))
        display.line(f"records in {folder}")
        if any(record["error"] for record in records):
            sys.exit(1)
