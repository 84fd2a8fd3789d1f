"""Reads what the phases of a run have left in its directory, and checks it first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tspc.compression import checkpoint
from tspc.compression.plan import Plan
from tspc.errors import RunError, TspcError
from tspc.phases.table import FIRST, NETWORK_PHASES
from tspc.store.schemas import FINISHED, problem


def read_record(path: Path) -> dict[str, Any]:
    """The record of a finished phase, from the header of its network's file.

    Raises RunError or WeightsError if it is damaged.
    """
    record: Any = checkpoint.read_header(path).get("info")
    wrong = problem(record, FINISHED)
    if wrong is None:
        try:
            wrong = _problem_of_plan(record["plan"], needed=path.stem == FIRST)
        except (TspcError, TypeError, ValueError, ArithmeticError) as error:
            wrong = f"plan: {error}"
    if wrong is not None:
        raise RunError(f"the header of {path} is damaged ({wrong}); remove the file, or pass overwrite=true")
    return record


def _problem_of_plan(plan: dict[str, Any] | None, needed: bool) -> str | None:
    if plan is None:
        return "plan is missing" if needed else None
    return None if Plan.from_dict(plan).rate_reached >= 0 else "plan: the rate is below 0"


def unfinished(folder: Path) -> str | None:
    """The phase that was stopped after it saved its state, behind the last finished phase; None if there is none."""
    for phase in reversed(NETWORK_PHASES):
        if (folder / f"{phase}.safetensors").exists():
            return None
        if any((folder / f"{before}{phase}.progress.pt").exists() for before in ("", "previous.")):
            return phase
    return None
