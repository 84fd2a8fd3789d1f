"""Hydra's untyped configuration → one frozen, checked object. Nothing else here or below knows OmegaConf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tspc.allocation import ALLOCATIONS
from tspc.calibration import Calibration
from tspc.config.reader import PHASES, Reader
from tspc.data import DataSpec
from tspc.display import VERBOSITIES
from tspc.errors import ConfigError
from tspc.models import NetworkSpec
from tspc.paths import OBJECTIVES, PATHS
from tspc.phases.benchmark import Benchmark
from tspc.phases.decompose import PlanRequest, Selection
from tspc.phases.distill import Distillation
from tspc.phases.export import Export
from tspc.phases.finetune import Finetuning
from tspc.phases.plan import PlanOverview
from tspc.planning import RATE_DECAYS, RATE_SCOPES, conflicts
from tspc.trackers import TRACKERS
from tspc.training import Recipe

__all__ = ["PHASES", "PRECISIONS", "TOP_LEVEL", "Config", "read_config"]

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
TOP_LEVEL = (
    *("method", "rate", "target_error", "allocation", "rate_decay", "rate_scope", "rank_multiple", "calibration"),
    *("paths", "objective"),
    *("dataset", "data_dir", "model", "pretrained", "output_dir"),
    *("batch_size", "epochs", "phase", "seed", "device", "overwrite", "variant"),
    *("eval_samples", "checkpoint_seconds", "precision", "compile", "tracker"),
    *("report", "runs", "verbosity"),
)


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
    export: Export | None
    benchmark: Benchmark | None
    report: bool
    runs: str | None
    verbosity: str
    settings: dict[str, Any]
    """All of it as it was given, for the result to tell."""
    command: str = "tspc"

    @property
    def trains(self) -> bool:
        """Whether data is indispensable."""
        return not {"plan", "decompose", "export", "benchmark"} >= set(self.phases) or self.pretrained is None


def read_config(config: DictConfig | dict[str, Any]) -> Config:
    """Checks a composed configuration. Raises ConfigError with every problem found, not just the first."""
    reader = Reader()
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
        "paths": reader.choice(raw, "paths", PATHS),
        "objective": reader.choice(raw, "objective", OBJECTIVES),
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
