"""Reads sections of a configuration, and collects their problems."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

from tspc import decompositions
from tspc.compression.goals import Terms
from tspc.compression.settings import PlanSettings, Selection
from tspc.data import BYTES, OWN_KIND, TEXT_KINDS, AnySpec, DataSpec, OwnSpec, TextSpec
from tspc.decompositions import Method
from tspc.errors import ConfigError, DecompositionError
from tspc.models import FAMILIES, NetworkSpec
from tspc.phases.phase import NoSettings, Phase
from tspc.phases.table import PHASES
from tspc.run.fields import Unfit, converted
from tspc.run.settings import LONGEST_NAME
from tspc.system.bounds import Bounds, shown, unknown
from tspc.training.tasks import KINDS, Task

OF_IMAGES = ("builtin", "torchvision", "timm")
"""The families whose networks take images alone."""
DATASET_EXTRAS = ("pretrained", "model", "batch_size", "epochs", "learning_rate", "pretrain")


def tokenizer_for(raw: dict[str, Any]) -> str | None:
    """The tokenizer of a network: that of its folder or of the hub, or bytes if it is a new one; None if unknown."""
    model, pretrained = raw["model"], raw["pretrained"]
    name = str(model.get("name")) if isinstance(model, dict) else ""
    if isinstance(model, dict) and model.get("family") == "transformers" and ("/" in name or Path(name).is_dir()):
        return name
    return BYTES if pretrained in (None, "random") else None


def without_tokenizer(raw: dict[str, Any]) -> str:
    """What to tell where no tokenizer is known: there is none, or no folder from which it could come."""
    model = raw["model"] if isinstance(raw["model"], dict) else {}
    if model.get("family") == "transformers" and raw["pretrained"] == "default":
        return (
            f"model.name={shown(model.get('name'))}: there is no such folder, from which pretrained=default could read "
            "weights and a tokenizer; name a folder, or a network of the hub (OWNER/NAME)"
        )
    return "dataset.tokenizer=null: the network brings no tokenizer; name the folder of one, or bytes"


class Section(Protocol):
    """A dataclass of settings that checks its own values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def problems(self, where: str) -> list[str]: ...


T = TypeVar("T", bound=Section)


class Reader:
    """`problems` has one line for each problem found so far."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def known(self, data: dict[str, Any], names: Any, where: str) -> None:
        self.problems += unknown(data, names, where)

    def section(self, cls: type[T], data: Any, where: str, **made: Any) -> T | None:
        """A dataclass from a mapping: unknown keys, missing keys, wrong types and values out of bounds are problems.

        The fields in `made` have their values already and are not read. `where` is empty at the top level.
        """
        if not isinstance(data, dict):
            self.problems.append(f"{where}={shown(data)}: expected a group of settings")
            return None
        fields = [field for field in dataclasses.fields(cls) if field.init and field.name not in made]
        prefix = f"{where}." if where else ""
        self.known(data, [field.name for field in fields], prefix)
        kinds, values, before = get_type_hints(cls), dict(made), len(self.problems)
        for field in fields:
            if field.name in data:
                try:
                    values[field.name] = converted(data[field.name], kinds[field.name])
                except Unfit as error:
                    self.problems.append(f"{prefix}{field.name}={shown(data[field.name])}: expected {error}")
            elif field.default is field.default_factory is dataclasses.MISSING:
                self.problems.append(f"{prefix}{field.name} is missing")
        required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
        if not required <= set(values):
            return None
        result = cls(**values)
        self.problems += result.problems(where)
        return result if len(self.problems) == before else None

    def mapping(self, data: dict[str, Any], key: str, where: str = "") -> dict[str, Any]:
        """A group of settings; anything else in its place is a problem."""
        if isinstance(data.get(key), dict):
            return data[key]
        self.problems.append(f"{where}{key}={shown(data.get(key))}: expected a group of settings")
        return {}

    def value(self, data: dict[str, Any], key: str, kind: Any, where: str = "") -> Any:
        """One value of a type; None, and a problem, if it has another type."""
        try:
            return converted(data.get(key), kind)
        except Unfit as error:
            self.problems.append(f"{where}{key}={shown(data.get(key))}: expected {error}")
            return None

    def number(self, data: dict[str, Any], key: str, kind: Any, bounds: Bounds) -> Any:
        before = data.get(key)
        try:
            value = converted(before, kind)
        except Unfit as error:
            what = bounds.of(str(error).removesuffix(", or null"))
            self.problems.append(f"{key}={shown(before)}: expected {what}")
            return None
        if value is not None and value not in bounds:
            what = "a whole number" if isinstance(value, int) else "a number"
            self.problems.append(f"{key}={shown(before)}: expected {bounds.of(what)}")
        return value

    def choice(self, data: dict[str, Any], key: str, options: tuple[str, ...], where: str = "") -> str:
        value = data.get(key)
        if not isinstance(value, str) or value not in options:
            self.problems.append(f"{where}{key}={shown(value)}: choose one of {', '.join(options)}")
        return str(value)

    def folder_name(self, value: str | None, setting: str) -> None:
        """A problem if a name cannot be a part of the run's path."""
        if value is None:
            return
        if not re.fullmatch(r"[^/\\\0]+", value) or value in (".", "..") or len(value) > LONGEST_NAME:
            self.problems.append(
                f"{setting}={shown(value)}: expected a name without slashes, of at most {LONGEST_NAME} characters"
            )

    def planning(self, data: dict[str, Any], selection: Selection) -> PlanSettings | None:
        keys = {field.name for field in dataclasses.fields(PlanSettings)} - {"method", "selection", "terms"}
        method = self.method(self.mapping(data, "method")) or PlanSettings.method
        terms = self.section(Terms, self.mapping(data, "contract"), "contract") or Terms()
        given = {key: data[key] for key in data if key in keys}
        return self.section(PlanSettings, given, "", method=method, selection=selection, terms=terms)

    def method(self, data: dict[str, Any]) -> Method | None:
        try:
            return decompositions.from_dict(data)
        except ConfigError as error:
            self.problems += error.problems
        except DecompositionError as error:
            self.problems.append(str(error))
        return None

    def task(self, data: dict[str, Any], metric: Any, has_data: bool) -> Task | None:
        """The task; one without a usual metric needs the user's, if there is data to judge by."""
        task = self.section(Task, {key: value for key, value in data.items() if key != "metric"}, "task")
        if metric is None and has_data:
            name = "this task" if task is None else f"task={task.name}"
            self.problems.append(f"{name} has no usual metric: give metric=package.module:function, or the name of one")
        return task

    def dataset(self, data: dict[str, Any], task: Task | None, tokenizer: str | None, lack: str) -> AnySpec | None:
        """The data set; texts without a tokenizer of their own get the `tokenizer` of the network.

        If it has none either, the `lack` is a problem.
        """
        self.mapping(data, "model", "dataset.")  # the network where model=default
        own = {key: value for key, value in data.items() if key not in DATASET_EXTRAS}
        kind, name = own.get("kind"), Task().name if task is None else task.name
        spec: AnySpec | None
        if kind in TEXT_KINDS:
            made = {"task": name}
            if own.get("tokenizer") is None:
                made |= {"tokenizer": tokenizer}
                if tokenizer is None:
                    self.problems.append(lack)
            spec = self.section(
                TextSpec, {key: value for key, value in own.items() if key not in made}, "dataset", **made
            )
        else:
            spec = self.section(OwnSpec if kind == OWN_KIND else DataSpec, own, "dataset")
        if spec is not None:
            self.folder_name(spec.name, "dataset.name")
        others = {known for kinds in KINDS.values() for known in kinds} - {*KINDS[name]}
        if task is not None and isinstance(kind, str) and kind in others:
            other = "" if kind not in (*TEXT_KINDS, OWN_KIND) else ", or another task"
            known = ", ".join(KINDS[name])
            self.problems.append(
                f"task={name} takes no dataset of the kind {shown(kind)}: choose one of {known}{other}"
            )
        return spec

    def network(self, model: dict[str, Any], dataset: AnySpec | None, task: Task | None) -> NetworkSpec | None:
        self.known(model, ("family", "name", "factory", "kwargs"), "model.")
        family = self.choice(model, "family", FAMILIES, "model.")
        name, factory = (self.value(model, key, str | None, "model.") for key in ("name", "factory"))
        kwargs = self.mapping(model, "kwargs", "model.") if "kwargs" in model else {}
        if family == "custom" and not factory:
            self.problems.append("model=custom needs model.factory=package.module:function")
        if family != "custom" and factory:
            self.problems.append(f"model.factory={shown(factory)} has an effect only with model=custom")
        if family != "custom" and not name:
            self.problems.append(f"model.name={shown(name)}: expected the name of a network")
        if not all(isinstance(key, str) for key in kwargs):
            self.problems.append(f"model.kwargs={shown(kwargs)}: expected names of arguments")
        if family == "builtin" and kwargs:
            self.problems.append(f"model.kwargs={shown(kwargs)}: the built-in networks take no arguments")
        name = name or str(factory).rpartition(":")[2]
        if family != "transformers":  # its networks may be folders
            self.folder_name(name, "model.name")
        if isinstance(dataset, TextSpec) and family in OF_IMAGES:
            self.problems.append(
                f"model.name={shown(name)} takes images, and task={dataset.task} gives it texts: "
                "choose model=transformers, or model=custom"
            )
        if dataset is None:
            return None
        sizes = dataset.num_classes, getattr(dataset, "channels", 3), getattr(dataset, "image_size", None)
        # A network of transformers has a head for its task; without one it classifies, as those of earlier versions do.
        head = task.name if task is not None and family == "transformers" and not task.is_of_images else None
        return NetworkSpec(family, name, *sizes, factory, kwargs, head)

    def phases(self, data: dict[str, Any]) -> dict[str, Any]:
        """The settings of the phases that are asked for, by name, in the order in which they run."""
        self.known(data, PHASES, "phase.")
        if not any(name in PHASES for name in data):
            self.problems.append(f"phase={shown(list(data))}: choose one or more of {', '.join(PHASES)}")
        return {name: self._phase(phase, data[name]) for name, phase in PHASES.items() if name in data}

    def _phase(self, phase: Phase, data: Any) -> Any:
        if data is not None:
            return self.section(phase.settings, data, f"phase.{phase.name}")
        if phase.settings is NoSettings:
            return NoSettings()
        self.problems.append(f"phase.{phase.name} is empty; see conf/phase/{phase.name}.yaml")
        return None
