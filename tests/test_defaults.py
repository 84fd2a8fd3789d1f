"""A default stands in a YAML file and in a dataclass: both say the same."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tspc.calibration import Calibration
from tspc.compression.goals import Terms
from tspc.compression.settings import PlanSettings, Selection
from tspc.data import OWN_KIND, TEXT_KINDS, DataSpec, OwnSpec, TextSpec
from tspc.decompositions import names, settings_of
from tspc.models import FAMILIES, NetworkSpec
from tspc.phases.benchmark import Benchmark
from tspc.phases.distill import Distillation
from tspc.phases.export import Export
from tspc.phases.finetune import Finetuning
from tspc.phases.plan import PlanOverview
from tspc.run.config import GROUPS, SHARED, TOP_LEVEL
from tspc.run.reader import DATASET_EXTRAS
from tspc.run.settings import RunSettings
from tspc.system.bounds import COUNT
from tspc.training import Recipe, Task

CONF = Path(__file__).parent.parent / "conf"
PHASES: dict[str, type | None] = {
    "benchmark": Benchmark,
    "compare": None,
    "decompose": Selection,
    "distill": Distillation,
    "export": Export,
    "finetune": Finetuning,
    "plan": PlanOverview,
    "pretrain": None,
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def stems(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def defaults(kind: type) -> dict[str, Any]:
    """Of a dataclass, as YAML has them."""
    found = {}
    for field in (field for field in fields(kind) if field.init):
        made = field.default if field.default_factory is MISSING else field.default_factory()
        found[field.name] = list(made) if isinstance(made, tuple) else str(made) if isinstance(made, Path) else made
    return found


def refers(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def check(stated: dict[str, Any], coded: dict[str, Any]) -> None:
    """That both have the same keys and, but for references to other keys and what has no default, the same values."""
    assert set(stated) == set(coded)
    same = {key: value for key, value in stated.items() if not refers(value) and coded[key] is not MISSING}
    assert same == {key: coded[key] for key in same}


def test_the_top_level_follows_from_the_classes():
    planning, run = ({field.name for field in fields(kind)} for kind in (PlanSettings, RunSettings))
    assert set(TOP_LEVEL) == planning - {"selection", "terms"} | run | {*GROUPS, *SHARED}
    assert len(set(TOP_LEVEL)) == len(TOP_LEVEL)


def test_the_general_keys():
    stated = {key: value for key, value in read("config").items() if key not in ("defaults", "hydra", *SHARED)}
    check(stated.pop("calibration"), defaults(Calibration))
    check(stated.pop("contract"), defaults(Terms))
    coded = defaults(PlanSettings) | defaults(RunSettings)
    check(stated, {key: value for key, value in coded.items() if key not in ("method", "selection", "terms")})
    options = {
        key: value for entry in read("config")["defaults"] if isinstance(entry, dict) for key, value in entry.items()
    }
    assert options["method"] == PlanSettings.method.name


@pytest.mark.parametrize("phase", stems("phase"))
def test_phases(phase):
    kind = PHASES[phase]
    check(read(f"phase/{phase}")[phase], {} if kind is None else defaults(kind))


@pytest.mark.parametrize("method", names())
def test_methods(method):
    check(read(f"method/{method}"), settings_of(method) | {"name": method})


IMAGES = {"epochs", "batch_size", "learning_rate", "weight_decay", "warmup"}
"""What a recipe chooses for its data."""


@pytest.mark.parametrize("dataset", stems("dataset"))
def test_data_sets(dataset):
    stated = read(f"dataset/{dataset}")
    kind = stated["kind"]
    spec = TextSpec if kind in TEXT_KINDS else OwnSpec if kind == OWN_KIND else DataSpec
    own = {key: value for key, value in stated.items() if key not in DATASET_EXTRAS}
    assert set(own) <= set(defaults(spec))
    if spec is not DataSpec:
        same = {key: value for key, value in defaults(spec).items() if key in own and value is not MISSING}
        assert {key: own[key] for key in same} == same
    assert stated["batch_size"] in COUNT
    assert stated["epochs"] in COUNT
    assert stated.get("learning_rate", 3e-3) > 0
    recipe, coded = stated["pretrain"], defaults(Recipe)
    if recipe is not None:
        own = IMAGES if spec is DataSpec else IMAGES | {"optimizer"}
        chosen = {key for key, value in recipe.items() if value != coded[key]}
        assert chosen == own, "the others are the defaults of the code"
        same = {key: recipe[key] for key in ("learning_rate", "weight_decay", "warmup")}
        rates = (0.1, 5e-4) if spec is DataSpec else (3e-4, 0.01)
        wanted = dict(zip(("learning_rate", "weight_decay"), rates, strict=True)) | {"warmup": 0.1}
        assert same == wanted, "one choice for all data sets of images, and one for all others"


@pytest.mark.parametrize("task", stems("task"))
def test_tasks(task):
    stated = read(f"task/{task}")
    stated = stated.get("task", stated)
    assert set(stated) == {*defaults(Task), "metric"}
    assert stated["name"] == task
    if task == Task().name:
        assert {key: stated[key] for key in defaults(Task)} == defaults(Task)
        assert stated["metric"] == RunSettings().metric


@pytest.mark.parametrize("model", stems("model"))
def test_models(model):
    stated = read(f"model/{model}")
    stated = stated.get("model", stated)
    assert set(stated) <= set(defaults(NetworkSpec))
    assert stated.get("kwargs", {}) == defaults(NetworkSpec)["kwargs"]
    assert stated.get("factory") == defaults(NetworkSpec)["factory"]
    assert refers(stated["family"]) or stated["family"] in FAMILIES
    if stated["family"] == "builtin":
        assert stated["name"] == model
