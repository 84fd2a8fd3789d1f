"""What `result.json` holds of a run, but for what was delivered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tspc.compression.plan import Plan
from tspc.models import NetworkSpec
from tspc.run.config import Config
from tspc.terminal.tables import versions


def result_of(
    config: Config,
    spec: NetworkSpec,
    directory: Path,
    finished: dict[str, dict[str, Any]],
    reference: dict[str, Any],
    sizes: dict[str, int],
) -> dict[str, Any]:
    """Plain data. `finished` has the records of the phases, in order; `sizes` are bytes before, after, in the file."""
    plan = Plan.from_dict(finished["decompose"]["plan"])
    return {
        "directory": str(directory),
        "method": config.planning.method.to_dict(),
        "rate": plan.rate,
        "rate_reached": plan.rate_reached,
        "rate_decay": plan.rate_decay,
        "rate_scope": plan.rate_scope,
        "allocation": plan.allocation,
        "objective": plan.objective,
        "paths": plan.paths,
        "target_error": config.planning.target_error,
        "output_error": plan.output_error,
        "dataset": config.dataset.name,
        "network": spec.name,
        "seed": config.seed,
        "reference": reference,
        "phases": {k: {"accuracy": v["accuracy"], "seconds": v["seconds"]} for k, v in finished.items()},
        "accuracy": finished[next(reversed(finished))]["accuracy"],
        "parameters": {
            "before": plan.network_dense_params,
            "after": plan.network_params,
            "tensorized_before": plan.dense_params,
            "tensorized_after": plan.params,
        },
        "bytes": sizes,
        "versions": versions(),
        "command": config.command,
        "settings": config.settings,
    }
