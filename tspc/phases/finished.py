"""What a finished phase tells in the header of its checkpoint, checked before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tspc.compression import checkpoint
from tspc.compression.plan import Plan
from tspc.errors import RunError, TspcError
from tspc.store.records import STAGES
from tspc.store.schemas import STAGE, problem


def read_stage(path: Path) -> dict[str, Any]:
    """What a finished stage tells in the header of its checkpoint. Raises RunError or WeightsError if it is damaged."""
    info: Any = checkpoint.read_header(path).get("info")
    wrong = problem(info, STAGE)
    if wrong is None:
        try:
            wrong = _problem_of_plan(info["plan"], needed=path.stem == STAGES[0])
        except (TspcError, TypeError, ValueError, ArithmeticError) as error:
            wrong = f"plan: {error}"
    if wrong is not None:
        raise RunError(f"the header of {path} is damaged ({wrong}); remove the file, or pass overwrite=true")
    return info


def _problem_of_plan(plan: dict[str, Any] | None, needed: bool) -> str | None:
    if plan is None:
        return "plan is missing" if needed else None
    return None if Plan.from_dict(plan).rate_reached >= 0 else "plan: the rate is below 0"
