"""Reads sections of a configuration and remembers what is wrong with them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tspc import decompositions
from tspc.calibration import Calibration
from tspc.data import OPTIONS, DataSpec
from tspc.decompositions import Method
from tspc.errors import ConfigError, DecompositionError
from tspc.models import FAMILIES, NetworkSpec
from tspc.phases.benchmark import Benchmark
from tspc.phases.decompose import Selection
from tspc.phases.distill import Distillation
from tspc.phases.export import Export
from tspc.phases.finetune import Finetuning
from tspc.phases.plan import PlanOverview
from tspc.training import Recipe

PHASES = ("pretrain", "plan", "decompose", "distill", "finetune", "export", "benchmark", "compare")
"""In the order in which they run."""

DATASET_EXTRAS = ("pretrained", "model", "batch_size", "epochs", "learning_rate", "pretrain")

T = TypeVar("T")


class Reader:
    """What was read, and `problems`: one line for each."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def known(self, data: dict[str, Any], names: Any, where: str) -> None:
        names = list(names)
        for key in data:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean {where}{near[0]}?" if near else f"known are: {', '.join(names) or 'none'}"
                self.problems.append(f"{where}{key} is not a setting; {hint}")

    def section(self, cls: type[T], data: dict[str, Any] | None, where: str) -> T | None:
        """A dataclass from a mapping: unknown keys, missing keys and wrong types are problems."""
        if data is None:
            return None
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        self.known(data, names, f"{where}.")
        known = {key: value for key, value in data.items() if key in names}
        lists = [f.name for f in dataclasses.fields(cls) if str(f.type).startswith("tuple")]  # type: ignore[arg-type]
        wrong = [key for key in lists if key in known and not isinstance(known[key], list | tuple)]
        if wrong:
            self.problems += [f"{where}.{key}={known[key]}: expected a list, as in {key}=[…]" for key in wrong]
            return None
        try:
            merged = OmegaConf.merge(OmegaConf.structured(_mutable(cls)), known)
            values = OmegaConf.to_container(merged, throw_on_missing=True)
            result = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[union-attr]
        except OmegaConfBaseException as error:
            self.problems.append(f"{where}: {' '.join(str(error).splitlines()[:2]).replace('    full_key: ', 'in ')}")
            return None
        if isinstance(result, Recipe | Calibration | PlanOverview | Selection | Export | Benchmark):
            self.problems += result.problems(where)
        return result

    def mapping(self, data: dict[str, Any], key: str) -> dict[str, Any]:
        """A group of settings; anything else in its place is a problem."""
        if isinstance(data.get(key), dict):
            return data[key]
        self.problems.append(f"{key}={data.get(key)}: expected a group of settings, from conf/{key}/")
        return {}

    def variant(self, value: Any) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.,=+-]+", str(value)):
            self.problems.append(f"variant={value}: expected letters, digits and . , = + - _ only")
        return None if value is None else str(value)

    def method(self, data: Any) -> Method | None:
        try:
            return decompositions.from_dict(data or {})
        except ConfigError as error:
            self.problems += error.problems
        except DecompositionError as error:
            self.problems.append(str(error))
        return None

    def dataset(self, data: dict[str, Any]) -> DataSpec | None:
        own = {key: value for key, value in data.items() if key not in DATASET_EXTRAS}
        spec = self.section(DataSpec, own, "dataset")
        if spec is None:
            return None
        for key in ("channels", "image_size"):
            if getattr(spec, key) < 1:
                self.problems.append(f"dataset.{key}={getattr(spec, key)}: expected at least 1")
        for key in ("pad", "workers"):
            if getattr(spec, key) < 0:
                self.problems.append(f"dataset.{key}={getattr(spec, key)}: expected at least 0")
        for key in ("mean", "std"):
            values = getattr(spec, key)
            if len(values) not in (1, spec.channels) or (key == "std" and min(values, default=0) <= 0):
                self.problems.append(f"dataset.{key}={list(values)}: expected {spec.channels} positive numbers")
        expected = OPTIONS.get(spec.kind, ())
        self.known(spec.options, expected, "dataset.options.")
        missing = [name for name in expected if name not in spec.options]
        if missing:
            self.problems.append(f"dataset.options lacks {', '.join(missing)}")
        return spec

    def network(self, model: dict[str, Any], dataset: dict[str, Any]) -> NetworkSpec:
        self.known(model, ("family", "name", "factory", "kwargs"), "model.")
        family, name = model.get("family"), model.get("name")
        if family not in FAMILIES:
            self.problems.append(f"model.family={family!r}: choose one of {', '.join(FAMILIES)}")
        factory = model.get("factory")
        if family == "custom":
            if not factory:
                self.problems.append("model=custom needs model.factory=package.module:function")
            name = name or str(factory).rpartition(":")[2]
        return NetworkSpec(
            family=str(family),
            name=str(name),
            num_classes=dataset.get("num_classes"),
            in_channels=dataset.get("channels", 3),
            image_size=dataset.get("image_size"),
            factory=factory,
            kwargs=dict(model.get("kwargs") or {}),
        )

    def phases(self, data: dict[str, Any]) -> dict[str, Any]:
        self.known(data, PHASES, "phase.")
        if not any(name in PHASES for name in data):
            self.problems.append(f"phase={list(data)}: choose one or more of {', '.join(PHASES)}")
        for name in ("pretrain", "compare"):
            self.known(data.get(name) or {}, (), f"phase.{name}.")
        self.problems += [f"phase.{p} is empty; see conf/phase/{p}.yaml" for p in PHASES[1:] if data.get(p, 0) is None]
        return {
            "phases": tuple(name for name in PHASES if name in data),
            "plan": self.section(PlanOverview, data.get("plan"), "phase.plan"),
            "decompose": self.section(Selection, data.get("decompose"), "phase.decompose"),
            "distill": self.section(Distillation, data.get("distill"), "phase.distill"),
            "finetune": self.section(Finetuning, data.get("finetune"), "phase.finetune"),
            "export": self.section(Export, data.get("export"), "phase.export"),
            "benchmark": self.section(Benchmark, data.get("benchmark"), "phase.benchmark"),
        }

    def number(
        self, data: dict[str, Any], key: str, low: float, high: float, open_low: bool = False, whole: bool = False
    ) -> float:
        value = data.get(key)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if ok and ((open_low and value == low) or (whole and value != int(value))):  # type: ignore[arg-type]
            ok = False
        if not ok:
            kind = "a whole number" if whole else "a number"
            limit = "" if high == float("inf") else f" and at most {high}"
            self.problems.append(
                f"{key}={value}: expected {kind} {'above' if open_low else 'of at least'} {low}{limit}"
            )
            return low
        return value  # type: ignore[return-value]

    def optional_count(self, data: dict[str, Any], key: str) -> int | None:
        return None if data.get(key) is None else int(self.number(data, key, 1, 2**31 - 1, whole=True))

    def optional_share(self, data: dict[str, Any], key: str) -> float | None:
        return None if data.get(key) is None else self.number(data, key, 0, 1, open_low=True)

    def choice(self, data: dict[str, Any], key: str, options: tuple[str, ...]) -> str:
        if data.get(key) not in options:
            self.problems.append(f"{key}={data.get(key)}: choose one of {', '.join(options)}")
        return str(data.get(key))

    def flag(self, data: dict[str, Any], key: str) -> bool:
        if not isinstance(data.get(key), bool):
            self.problems.append(f"{key}={data.get(key)}: expected true or false")
        return bool(data.get(key))


def _mutable(cls: type) -> type:
    """A schema with the fields of a frozen dataclass, in the types that OmegaConf knows."""
    fields = []
    for field in dataclasses.fields(cls):
        kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list[\1]", str(field.type))
        default: Any = field.default
        if default is dataclasses.MISSING:
            default = "???" if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = list(default) if isinstance(default, tuple) else default
        is_box = isinstance(value, list | dict)
        made = dataclasses.field(default_factory=lambda v=value: v) if is_box else dataclasses.field(default=value)
        fields.append((field.name, eval(kind, {"Any": Any}), made))
    return dataclasses.make_dataclass(cls.__name__, fields)
