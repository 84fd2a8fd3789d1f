"""Where the files of a run lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tspc.compression.settings import GOALS
from tspc.decompositions import resolve
from tspc.models import NetworkSpec
from tspc.run.config import Config


def shared_folder(config: Config, spec: NetworkSpec) -> Path:
    """Where the runs of a sweep share their reference network."""
    return config.output_dir / config.dataset.name / spec.name / "reference"


LABELS = {
    "allocation": "{}",
    "rank_multiple": "multiple{}",
    "rate_decay": "{}",
    "rate_scope": "{}",
    "objective": "",
    "paths": "",
    "selection": "",
}
"""How a planning setting that departs from its default appears in the folder's name; others as `<key><value>`.

For an empty one the user names a `variant`."""


def run_folder(config: Config, spec: NetworkSpec) -> Path:
    """`<output_dir>/<dataset>/<network>/<method>-<rate>/seed<seed>`.

    Settings of the method and of the planning that depart from the defaults are appended to the rate (`LABELS`), and so
    is `variant`.
    """
    planning = config.planning
    settings = planning.method.to_dict()
    defaults = resolve(settings["name"]).to_dict()
    goal = f"{planning.rate:g}" if planning.target_error is None else f"error{planning.target_error:g}"
    parts = [f"{settings['name']}-{goal}"]
    parts += [f"{key}{_brief(value)}" for key, value in settings.items() if value != defaults[key]]
    usual = {f.name: f.default for f in dataclasses.fields(planning) if f.name not in ("method", *GOALS)}
    for key in sorted(usual, key=[*LABELS, *usual].index):
        if getattr(planning, key) != usual[key]:
            parts.append(LABELS.get(key, f"{key}{{}}").format(getattr(planning, key)))
    parts.append(config.variant or "")
    return config.output_dir / config.dataset.name / spec.name / "-".join(filter(None, parts)) / f"seed{config.seed}"


def _brief(value: Any) -> str:
    """A method's setting in a directory's name: of `auto`'s candidates their names."""
    return "+".join(member["name"] for member in value) if isinstance(value, list) else str(value)
