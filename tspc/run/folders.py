"""Where the files of a run lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tspc.decompositions import resolve
from tspc.models import NetworkSpec
from tspc.run.config import Config


def shared_folder(config: Config, spec: NetworkSpec) -> Path:
    """Where the runs of a sweep share their reference network."""
    return config.output_dir / config.dataset.name / spec.name / "reference"


def run_folder(config: Config, spec: NetworkSpec) -> Path:
    """`<output_dir>/<dataset>/<network>/<method>-<rate>/seed<seed>`; settings of the method, allocation, multiple,
    decay and scope that depart from the defaults are appended to the rate, and so is `variant`."""
    planning = config.planning
    settings = planning.method.to_dict()
    defaults = resolve(settings["name"]).to_dict()
    goal = f"{planning.rate:g}" if planning.target_error is None else f"error{planning.target_error:g}"
    parts = [f"{settings['name']}-{goal}"]
    parts += [f"{key}{_brief(value)}" for key, value in settings.items() if value != defaults[key]]
    parts += [planning.allocation] if planning.allocation != "global" else []
    parts += [f"multiple{planning.rank_multiple}"] if planning.rank_multiple != 1 else []
    parts += [planning.rate_decay] if planning.rate_decay != "flat" else []
    parts += ["network"] if planning.rate_scope == "network" else []
    parts += [config.variant] if config.variant else []
    return config.output_dir / config.dataset.name / spec.name / "-".join(parts) / f"seed{config.seed}"


def _brief(value: Any) -> str:
    """A method's setting in a directory's name: of `auto`'s candidates their names."""
    return "+".join(member["name"] for member in value) if isinstance(value, list) else str(value)
