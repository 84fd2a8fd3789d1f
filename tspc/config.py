"""Hydra's untyped configuration → one frozen, checked object. Nothing else here or below knows OmegaConf."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tspc import decompositions
from tspc.allocation import ALLOCATIONS
from tspc.calibration import Calibration
from tspc.data import OPTIONS, DataSpec
from tspc.decompositions import Method
from tspc.display import VERBOSITIES
from tspc.errors import ConfigError, DecompositionError
from tspc.models import FAMILIES, NetworkSpec
from tspc.phases.decompose import PlanRequest, Selection
from tspc.phases.distill import Distillation
from tspc.phases.finetune import Finetuning
from tspc.phases.plan import PlanOverview
from tspc.planning import RATE_DECAYS, RATE_SCOPES, conflicts
from tspc.trackers import TRACKERS
from tspc.training import Recipe

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
PHASES = ("pretrain", "plan", "decompose", "distill", "finetune", "compare")
"""In the order in which they run."""

TOP_LEVEL = (
    *("method", "rate", "target_error", "allocation", "rate_decay", "rate_scope", "rank_multiple", "calibration"),
    *("dataset", "data_dir", "model", "pretrained", "output_dir"),
    *("batch_size", "epochs", "phase", "seed", "device", "overwrite", "variant"),
    *("eval_samples", "checkpoint_seconds", "precision", "compile", "tracker"),
    *("report", "runs", "verbosity"),
)
DATASET_EXTRAS = ("pretrained", "model", "batch_size", "epochs", "learning_rate", "pretrain")

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. A phase that was not asked for is None."""

    request: PlanRequest
    calibration: Calibration
    dataset: DataSpec
    data_dir: Path | None
    network: NetworkSpec
    pretrained: str | None
    pretrain_recipe: Recipe | None
    output_dir: Path
    seed: int
    device: str
    overwrite: bool
    variant: str | None
    eval_samples: int | None
    checkpoint_seconds: float
    precision: str
    compile: bool
    tracker: str
    phases: tuple[str, ...]
    plan: PlanOverview | None
    decompose: Selection | None
    distill: Distillation | None
    finetune: Finetuning | None
    report: bool
    runs: str | None
    verbosity: str
    settings: dict[str, Any]
    """All of it as it was given, for the result to tell."""
    command: str = "tspc"

    @property
    def trains(self) -> bool:
        """Whether data is indispensable."""
        return not {"plan", "decompose"} >= set(self.phases) or self.pretrained is None


def read_config(config: DictConfig | dict[str, Any]) -> Config:
    """Checks a composed configuration. Raises ConfigError with every problem found, not just the first."""
    reader = _Reader()
    try:
        raw = config if isinstance(config, dict) else OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([str(error).splitlines()[0]]) from error
    raw = cast(dict[str, Any], raw)
    reader.known(raw, TOP_LEVEL, "")
    dataset = reader.mapping(raw, "dataset")
    request: dict[str, Any] = {
        "method": reader.method(raw.get("method")),
        "rate": reader.number(raw, "rate", 0, 1, open_low=True),
        "target_error": reader.optional_share(raw, "target_error"),
        "allocation": reader.choice(raw, "allocation", ALLOCATIONS),
        "rate_decay": reader.choice(raw, "rate_decay", RATE_DECAYS),
        "rate_scope": reader.choice(raw, "rate_scope", RATE_SCOPES),
        "rank_multiple": reader.number(raw, "rank_multiple", 1, 2**31 - 1, whole=True),
    }
    values: dict[str, Any] = {
        "calibration": reader.section(Calibration, reader.mapping(raw, "calibration"), "calibration"),
        "dataset": reader.dataset(dataset),
        "data_dir": None if raw.get("data_dir") is None else Path(str(raw["data_dir"])),
        "network": reader.network(reader.mapping(raw, "model"), dataset),
        "pretrained": None if raw.get("pretrained") is None else str(raw["pretrained"]),
        "pretrain_recipe": reader.section(Recipe, dataset.get("pretrain"), "dataset.pretrain"),
        "output_dir": Path(str(raw.get("output_dir"))),
        "seed": reader.number(raw, "seed", 0, 2**31 - 1, whole=True),
        "device": str(raw.get("device")),
        "overwrite": reader.flag(raw, "overwrite"),
        "variant": reader.variant(raw.get("variant")),
        "eval_samples": reader.optional_count(raw, "eval_samples"),
        "checkpoint_seconds": reader.number(raw, "checkpoint_seconds", 0, float("inf")),
        "precision": reader.choice(raw, "precision", PRECISIONS),
        "compile": reader.flag(raw, "compile"),
        "tracker": reader.choice(raw, "tracker", TRACKERS),
        "report": reader.flag(raw, "report"),
        "runs": None if raw.get("runs") is None else str(raw["runs"]),
        "verbosity": reader.choice(raw, "verbosity", VERBOSITIES),
        "settings": raw,
        **reader.phases(reader.mapping(raw, "phase")),
    }
    if values["pretrained"] is None and dataset.get("pretrain") is None:
        reader.problems.append(
            f"pretrained=null, but dataset {dataset.get('name')} has no recipe to train a reference; "
            "pass pretrained=FILE, default or random"
        )
    reader.problems += conflicts(request["allocation"], request["rate_decay"])
    if "compare" in values["phases"] and len(values["phases"]) > 1:
        reader.problems.append("phase=compare looks at runs that are there already: ask for it alone")
    if values["runs"] is not None and "compare" not in values["phases"]:
        reader.problems.append(f"runs={values['runs']} has an effect with phase=compare only")
    if values["phases"] == ("pretrain",) and values["pretrained"] is not None:
        reader.problems.append(f"phase=pretrain, but pretrained={values['pretrained']} is given: nothing to train")
    if reader.problems:
        raise ConfigError(reader.problems)
    selection = values["decompose"] or Selection()
    return Config(request=PlanRequest(**request, selection=selection), **values)


class _Reader:
    """Reads sections and remembers what is wrong with them."""

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
        try:
            merged = OmegaConf.merge(OmegaConf.structured(_mutable(cls)), known)
            values = OmegaConf.to_container(merged, throw_on_missing=True)
            result = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[union-attr]
        except OmegaConfBaseException as error:
            self.problems.append(f"{where}: {' '.join(str(error).splitlines()[:2]).replace('    full_key: ', 'in ')}")
            return None
        if isinstance(result, Recipe | Calibration | PlanOverview):
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
        self.known({**(data.get("pretrain") or {}), **(data.get("compare") or {})}, (), "phase.pretrain.")
        self.problems += [f"phase.{p} is empty; see conf/phase/{p}.yaml" for p in PHASES[1:] if data.get(p, 0) is None]
        return {
            "phases": tuple(name for name in PHASES if name in data),
            "plan": self.section(PlanOverview, data.get("plan"), "phase.plan"),
            "decompose": self.section(Selection, data.get("decompose"), "phase.decompose"),
            "distill": self.section(Distillation, data.get("distill"), "phase.distill"),
            "finetune": self.section(Finetuning, data.get("finetune"), "phase.finetune"),
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
        kind = str(field.type).replace("tuple[float, ...]", "list[float]").replace("tuple[str, ...]", "list[str]")
        default: Any = field.default
        if default is dataclasses.MISSING:
            default = "???" if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = list(default) if isinstance(default, tuple) else default
        is_box = isinstance(value, list | dict)
        made = dataclasses.field(default_factory=lambda v=value: v) if is_box else dataclasses.field(default=value)
        fields.append((field.name, eval(kind, {"Any": Any}), made))
    return dataclasses.make_dataclass(cls.__name__, fields)
