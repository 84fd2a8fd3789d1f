"""Turns Hydra's untyped configuration into one frozen, checked object that needs no OmegaConf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tspc.calibration.samples import Calibration
from tspc.compression.settings import PlanSettings, Selection
from tspc.data import KINDS_IN_FOLDERS, NO_DATA, AnySpec
from tspc.decompositions import names
from tspc.errors import ConfigError
from tspc.models import NetworkSpec
from tspc.phases.table import FIRST, PHASES
from tspc.run.effects import without_effect
from tspc.run.reader import Reader, tokenizer_for, without_tokenizer
from tspc.run.settings import RunSettings
from tspc.store.scores import scale_of
from tspc.system.bounds import COUNT, shown
from tspc.training import Metric, Recipe, Task, metric_of
from tspc.training.metrics import Function, name_of

GROUPS = ("calibration", "contract", "dataset", "model", "phase", "task")
GROUPED = ("selection", "terms")
"""Fields of `PlanSettings` that have groups of their own."""
SHARED = ("batch_size", "epochs")
"""Keys that the YAML files of several phases refer to."""
TOP_LEVEL = (
    *(field.name for kind in (PlanSettings, RunSettings) for field in fields(kind) if field.name not in GROUPED),
    *(*GROUPS, *SHARED),
)
"""The keys of a configuration."""


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Everything that a run depends on."""

    planning: PlanSettings
    calibration: Calibration
    dataset: AnySpec
    task: Task
    network: NetworkSpec
    pretrain_recipe: Recipe | None
    phases: dict[str, Any]
    """The settings of the phases that were asked for, in the order in which they run."""
    settings: dict[str, Any]
    """The whole configuration as plain data; the result holds a copy."""
    command: str = "tspc"
    metric_function: Function | None = None
    """The metric, if a function was given itself and not by its name."""

    def judge(self) -> Metric:
        """The metric that judges networks. Raises ConfigError if it is a function that cannot be imported."""
        return self.task.judged_by(metric_of(self.metric_function or self.metric))

    @property
    def trains(self) -> bool:
        """Whether the run cannot do without data."""
        return self.pretrained is None or any(PHASES[name].needs_data for name in self.phases)


def read_config(config: DictConfig | dict[str, Any], given: Sequence[str] = ()) -> Config:
    """Checks a composed configuration. Raises ConfigError with every problem found, not just the first.

    Plain data may hold a function as the `metric`, in place of its name. `given` are the keys that the user set, such
    as `phase.finetune.momentum`. A key of these that has no effect is a problem, too.
    """
    reader, raw = Reader(), _plain(config)
    function = raw.get("metric")
    function = function if callable(function) else None
    raw = raw if function is None else raw | {"metric": name_of(function)}
    reader.known(raw, TOP_LEVEL, "")
    missing = [key for key in TOP_LEVEL if key not in raw]
    if missing:
        # A group is missing if the list of defaults names no option of it. The message names the options.
        hint = {"phase": f"choose one or more of {', '.join(PHASES)}", "method": f"choose one of {', '.join(names())}"}
        told = [f"{key} is missing; {hint.get(key, 'every configuration needs it')}" for key in missing]
        raise ConfigError(reader.problems + told)
    values = _values(reader, raw)
    _contradictions(reader, raw, values)
    problems = reader.problems or without_effect(raw, given)
    if problems:
        raise ConfigError(problems)
    return Config(**values, metric_function=function)


def _plain(config: DictConfig | dict[str, Any]) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    try:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError([f"{key}: {reason}" if key else reason]) from error


def _values(reader: Reader, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of Config."""
    phases = reader.phases(reader.mapping(raw, "phase"))
    group = reader.mapping(raw, "dataset")
    task = reader.task(reader.mapping(raw, "task"), raw["metric"], has_data=group.get("kind") != NO_DATA)
    dataset = reader.dataset(group, task, tokenizer_for(raw), without_tokenizer(raw))
    recipe = group.get("pretrain")
    # Distillation and finetuning check their own values. These are checked because a phase may not use them.
    reader.number(raw, "batch_size", int, COUNT)
    reader.number(raw, "epochs", int, COUNT)
    alone = {field.name for field in fields(RunSettings)}
    # That there is no metric was told with the task.
    run = reader.section(
        RunSettings, {key: raw[key] for key in raw if key in alone and (key, raw[key]) != ("metric", None)}, ""
    )
    return {
        **({} if run is None else vars(run)),
        "planning": reader.planning(raw, phases.get(FIRST) or Selection()),
        "calibration": reader.section(Calibration, raw["calibration"], "calibration"),
        "dataset": dataset,
        "task": task,
        "network": reader.network(reader.mapping(raw, "model"), dataset, task),
        "pretrain_recipe": None if recipe is None else reader.section(Recipe, recipe, "dataset.pretrain"),
        "settings": raw,
        "phases": phases,
    }


def _contradictions(reader: Reader, raw: dict[str, Any], values: dict[str, Any]) -> None:
    """Finds settings that are right alone, but not together."""
    dataset, pretrained, phases = raw["dataset"], raw["pretrained"], values["phases"]
    if pretrained is None and values["task"] is not None and not values["task"].has_labels:
        reader.problems.append(
            f"task={values['task'].name} has no targets with which a reference could be trained: "
            "pass pretrained=FILE, default or random"
        )
    elif pretrained is None and isinstance(dataset, dict) and dataset.get("pretrain") is None:
        reader.problems.append(
            f"pretrained=null, but dataset {shown(dataset.get('name'))} has no recipe to train a reference; "
            "pass pretrained=FILE, default or random"
        )
    if "compare" in phases and len(phases) > 1:
        reader.problems.append("phase=compare shows runs that exist already: give it alone, without other phases")
    if raw["runs"] is not None and "compare" not in phases:
        reader.problems.append(f"runs={shown(raw['runs'])} has an effect only with phase=compare")
    if list(phases) == ["pretrain"] and pretrained is not None:
        reader.problems.append(f"phase=pretrain, but pretrained={shown(pretrained)} is given: nothing to train")
    export, scale = phases.get("export"), scale_of(str(raw["metric"]))
    if export is not None and scale.is_share and export.accuracy_tolerance > 1:
        reader.problems.append(
            f"phase.export.accuracy_tolerance={shown(export.accuracy_tolerance)}: expected a number from 0 to 1, "
            f"because {scale.label} is a share"
        )
    spec = values["dataset"]
    if raw["data_dir"] is not None and spec is not None and spec.kind not in KINDS_IN_FOLDERS:
        reader.problems.append(
            f"data_dir={shown(raw['data_dir'])} has no effect: dataset {shown(spec.name)} reads no files"
        )
