"""Settings that nobody should give: each is refused by a line that names it, and none ends in a traceback."""

from __future__ import annotations

import copy
import os
import random
from functools import lru_cache
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.test_configs import composed
from tspc.errors import ConfigError
from tspc.run.config import Config, read_config

FUZZED = int(os.environ.get("TSPC_FUZZ_SETTINGS", "300"))
"""How many random configurations are tried."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2.0, 0.5, -0.0, 1e308, -1e308, 1e-320, 10**30, -(10**30), 10**400),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "null",
        "1",
        "1e3",
        "nan",
        "yes",
        "a/b",
        "..",
        "\0",
        "é" * 300,
        "9" * 5000,
    ),
    *([], {}, [None], [1], [[1]], [float("nan")], ["x"], {"a": 1}, [{"a": [1]}], {1: 2}, {"name": "cp"}),
    *(
        "${rate}",
        "${nope}",
        "${oc.env:NO_SUCH_VARIABLE}",
        "${dataset}",
        "${phase.finetune.epochs}",
        "cp",
        "none",
        "adam",
    ),
)
STARTS = (
    (),
    ("method=auto",),
    ("method=rcp", "dataset=cifar10"),
    ("dataset=imagefolder", "method=cp"),
    ("dataset=synthetic", "phase=[plan,decompose,export,benchmark]"),
    ("model=custom", "model.factory=a:b", "phase=decompose"),
    ("phase=compare", "dataset=imagenet"),
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a configuration: keys and numbers of items."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def mutated(config: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """With one to three things replaced, taken out or added."""
    config = copy.deepcopy(config)
    for _ in range(generator.randint(1, 3)):
        *path, last = generator.choice(places(config))
        node: Any = config
        for key in path:
            node = node[key]
        what = generator.random()
        if what < 0.8:
            node[last] = copy.deepcopy(generator.choice(ODD))
        elif what < 0.9 or not isinstance(node, dict):
            del node[last]
        else:
            node[generator.choice(("new", "epochs", "name", 5))] = copy.deepcopy(generator.choice(ODD))
    return config


def test_random_configurations_are_read_or_refused():
    generator = random.Random(0)
    starts = [composed(*overrides) for overrides in STARTS]
    read, lines = 0, list[str]()
    for _ in range(FUZZED):
        config = mutated(generator.choice(starts), generator)
        try:
            # Composed by Hydra it has interpolations, too.
            read += isinstance(read_config(OmegaConf.create(config) if generator.random() < 0.2 else config), Config)
        except ConfigError as error:
            lines += error.problems
    assert 0 < read < FUZZED / 2
    assert len(lines) >= FUZZED - read
    assert max(map(len, lines)) < 700, "readable lines"


starting_with = lru_cache(composed)


def changed(changes: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """A composed configuration with other values at some keys, as {"phase.finetune.epochs": 3}."""
    config = copy.deepcopy(starting_with(*overrides))
    for key, value in changes.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def refused(key: str, value: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(changed({key: value}, *overrides))
    return caught.value.problems


NUMBERS = (
    *("rate", "target_error", "rank_multiple", "seed", "eval_samples", "checkpoint_seconds", "batch_size", "epochs"),
    *(f"calibration.{key}" for key in ("samples", "batch_size", "patches", "damping", "memory")),
    *(f"dataset.{key}" for key in ("num_classes", "channels", "image_size", "pad", "resize", "workers")),
    *(f"dataset.pretrain.{key}" for key in ("epochs", "learning_rate", "momentum", "weight_decay", "warmup")),
    *(f"phase.distill.{key}" for key in ("images", "memory", "held_out", "least_gain", "steps", "average", "clip")),
    *(f"phase.finetune.{key}" for key in ("distillation", "temperature", "features", "careful_below", "accumulate")),
    *("phase.decompose.min_params", "method.max_iterations", "method.tolerance", "method.seed", "method.restarts"),
)


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds_on_both_sides(key):
    for value in (-1, 1e308, 10**30, float("nan"), float("-inf")):
        (problem, *_) = refused(key, value, "method=cp")
        assert problem.startswith(f"{key}="), problem


@pytest.mark.parametrize("key", NUMBERS)
def test_null_and_groups_are_no_numbers(key):
    for value in ([1], {"a": 1}, True, "many"):
        assert refused(key, value, "method=cp")[0].startswith(f"{key}=")
    if key not in MAY_BE_NULL:
        assert refused(key, None, "method=cp")[0].startswith(f"{key}=null")


MAY_BE_NULL = ("rate", "target_error", "eval_samples", "dataset.num_classes", "dataset.resize", "phase.distill.steps")


def test_whole_numbers_may_be_written_with_a_point():
    numbers = {"seed": 1.0, "phase.finetune.epochs": 2.0, "method.restarts": 3.0}
    config = read_config(changed(numbers, "method=cp"))
    found = config.seed, config.phases["finetune"].epochs, config.planning.method.to_dict()["restarts"]
    assert found == (1, 2, 3)
    assert all(type(number) is int for number in found)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("calibration.compensate", 5, "calibration.compensate=5: expected true or false"),
        ("output_dir", None, "output_dir=null: expected a text"),
        ("dataset.num_classes", 0, "dataset.num_classes=0: expected a whole number of at least 1 and at most 10000000"),
        ("dataset.std", [float("nan")], "dataset.std=[nan]: expected 1 number of at least 1e-06"),
        ("dataset.mean", [{"a": 1}], "dataset.mean=[{'a': 1}]: expected a list in which each item is a number"),
        (
            "dataset.image_size",
            10**6,
            "dataset.image_size=1000000: expected a whole number of at least 1 and at most 16384",
        ),
        ("dataset.pad", 100000, "dataset.pad=100000: expected a whole number of at least 0 and at most 8"),
        ("phase.distill", 5, "phase.distill=5: expected a group of settings"),
        ("dataset.pretrain", "abc", "dataset.pretrain=abc: expected a group of settings"),
        ("calibration", None, "calibration=null: expected a group of settings"),
        ("phase.distill.label_smoothing", 0.1, "phase.distill.label_smoothing is not a setting; known are: epochs,"),
        ("phase.distill.accumulate", 1, "phase.distill.accumulate is not a setting; known are: epochs,"),
        ("data_dir", "photos", "data_dir=photos has no effect: dataset digits reads no files"),
        ("model.kwargs", {"width": 3}, "model.kwargs={'width': 3}: the built-in networks take no arguments"),
        ("model.factory", "a:b", "model.factory=a:b has an effect only with model=custom"),
        ("dataset.kind", "folders", "dataset.kind=folders: choose one of digits,"),
        ("dataset.name", "../x", "dataset.name=../x: expected a name without slashes"),
        ("method", {"name": "auto", "candidates": [[1]]}, "method [1] is unknown; choose one of cp,"),
        ("variant", 5000 * "/", f"variant={60 * '/'}…: expected letters"),
    ],
)
def test_one_line_names_the_setting(key, value, message):
    (problem,) = refused(key, value)
    assert problem.startswith(message)


@pytest.mark.parametrize("key", ["calibration", "rate", "phase"])
def test_a_key_that_was_taken_out_is_called_missing(key):
    config = changed({})
    del config[key]
    with pytest.raises(ConfigError, match=f"^{key} is missing; "):
        read_config(config)


@pytest.mark.parametrize(
    ("value", "reason"), [("${no.such}", "Interpolation key 'no.such' not found"), ("${rate}", "Recursive")]
)
def test_an_interpolation_that_fails_names_its_key(value, reason):
    with pytest.raises(ConfigError, match=f"^rate: {reason}"):
        read_config(OmegaConf.create(changed({"rate": value})))


IDLE = {
    "phase.finetune.momentum=0.5": "phase.finetune.optimizer=adam",
    "phase.finetune.epochs=3 phase.finetune.steps=5": "phase.finetune.steps=5",
    "phase.finetune.evaluations=3 phase.finetune.held_out=0": "phase.finetune.held_out=0",
    "phase.finetune.temperature=2 phase.finetune.distillation=0": "phase.finetune.distillation=0",
    "phase.finetune.label_smoothing=0.1 phase.finetune.distillation=1": "phase.finetune.distillation=1",
    "calibration.damping=0.1 calibration.samples=0": "calibration.samples=0",
    "contract.images=500 rate=0.1": "max_drop=null",
    "contract.batch=4 max_drop=1": "latency=null and speedup=null",
    "+dataset.resize=64": "images that are all kept in memory",
    "+dataset.in_memory=false": "dataset digits",
}


@pytest.mark.parametrize("arguments", IDLE)
def test_a_setting_that_does_nothing_beside_another_is_refused(cli, tmp_path, arguments):
    code, out, err = cli(*arguments.split())
    first = arguments.split()[0].lstrip("+")
    assert (code, out, err) == (1, "", f"tspc: {first} has no effect with {IDLE[arguments]}; leave it out\n")
    assert os.listdir(tmp_path) == []


LINES = {
    "model=null": "model=null: each names one of the files in conf/",
    "=5": "=5 names no setting; write KEY=VALUE",
    "rate": "rate: expected KEY=VALUE",
    "method=[svd,cp]": "method=[svd,cp]: choose one option",
    "dataset=[digits]": "dataset=[digits]: choose one option",
    "pretrained=epoch=12.pt": "needs quotes of its own: \"pretrained='epoch=12.pt'\"",
    "rate=${nope}": "rate: Interpolation key 'nope' not found",
    "device=meta": "device=meta cannot be used here",
    "seed=" + 5000 * "9": "the settings cannot be read (ValueError: Exceeds the limit",
}


@pytest.mark.parametrize("argument", LINES)
def test_what_the_command_line_cannot_mean_gets_one_line(cli, tmp_path, argument):
    code, out, err = cli(argument)
    assert (code, out) == (1, "")
    assert LINES[argument] in err
    assert err.startswith("tspc: ")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_value_with_signs_is_taken_in_quotes_of_its_own(cli):
    code, _, err = cli("pretrained='epoch=12.pt'")
    assert code == 1
    assert "epoch=12.pt: there is no such file" in err
