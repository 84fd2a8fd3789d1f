"""The folders of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tspc.compression.goal_names import GOALS
from tspc.compression.goals import goal_of
from tspc.decompositions import resolve
from tspc.models import NetworkSpec
from tspc.run.config import Config
from tspc.system.bounds import shown


def shared_folder(config: Config, spec: NetworkSpec) -> Path:
    """The folder of a reference that was trained, and of measurements of it; runs share it."""
    return config.output_dir / config.dataset.name / _name_of(spec) / "reference"


def _name_of(spec: NetworkSpec) -> str:
    """The network's part of the path. A network may be a folder anywhere, which is then known by its own name."""
    path = Path(spec.name)
    return path.resolve().name if path.is_absolute() or ".." in path.parts else spec.name


def elsewhere(config: Config, usual: str) -> str:
    """How to keep both of two runs that want one folder; `usual` is how, if both have the same data.

    Two folders of data have one name if they are of one kind, such as texts for a task: the user gives another one.
    """
    return (
        usual
        if config.data_dir is None
        else f"dataset.name=NAME if data_dir={config.data_dir} is other data, or {usual}"
    )


LABELS = {
    "allocation": "{}",
    "rank_multiple": "multiple{}",
    "rate_decay": "{}",
    "rate_scope": "{}",
    "bits": "{}bits",
    "rate_unit": "{}",
    "objective": "",
    "paths": "",
    "runtime": "",
    "selection": "",
    "terms": "",
}
"""How a planning setting that differs from its default is written in the folder's name.

A key that is not in this table is written as `<key><value>`. A key with an empty text is left out; to vary it, the user
names a `variant`."""


def run_folder(config: Config, spec: NetworkSpec) -> Path:
    """`<output_dir>/<dataset>/<network>/<method>-<rate>/seed<seed>`.

    Settings of the method and of the planning are appended to the rate if they differ from the default (`LABELS`), and
    so is `variant`.
    """
    planning, goal = config.planning, goal_of(config.planning.identity)
    settings = planning.method.to_dict()
    defaults = resolve(settings["name"]).to_dict()
    parts = [f"{settings['name']}-{goal}"]
    parts += [f"{key}{_brief(value)}" for key, value in settings.items() if value != defaults[key]]
    usual = {f.name: f.default for f in dataclasses.fields(planning) if f.name not in ("method", *GOALS)}
    for key in sorted(usual, key=[*LABELS, *usual].index):
        if getattr(planning, key) != usual[key]:
            label = LABELS.get(key, f"{key}{{}}").format(getattr(planning, key))
            parts.append("" if label == goal else label)
    parts.append(config.variant or "")
    return (
        config.output_dir / config.dataset.name / _name_of(spec) / "-".join(filter(None, parts)) / f"seed{config.seed}"
    )


def _brief(value: Any) -> str:
    """A setting of a method in a directory's name. Of the candidates of `auto` only the names are used."""
    if isinstance(value, bool):
        return shown(value)
    return "+".join(member["name"] for member in value) if isinstance(value, list) else str(value)
