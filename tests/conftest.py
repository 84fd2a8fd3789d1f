"""Options and helpers that the tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small import CPU, SPEC, network, recipe

SHARED = os.environ.get("TSPC_TEST_DATA")
"""A folder with data/ and weights/ for the tests on real weights; `.ci/run` sets it where there is one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))


@pytest.fixture
def shared() -> Path:
    if SHARED is None:
        pytest.skip("needs a folder with public weights: set TSPC_TEST_DATA")
    return Path(SHARED)


@pytest.fixture
def fashion_mnist() -> Path:
    folder = os.environ.get("TSPC_TEST_FASHION_MNIST")
    if folder is None:
        pytest.skip("needs Fashion-MNIST's idx files: set TSPC_TEST_FASHION_MNIST")
    return Path(folder)


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs the command in this process, in an empty folder: (exit code, stdout, stderr)."""
    from tspc.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tspc", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def context() -> Any:
    """What a phase is given; `records` has what it notes."""
    from tspc.data import load_data
    from tspc.phases.context import Context
    from tspc.terminal.display import Display
    from tspc.training import Hardware

    records: list[dict[str, Any]] = []
    made = Context(load_data(SPEC), Hardware(CPU), 0, Display(), records.append)
    object.__setattr__(made, "records", records)
    return made


@pytest.fixture
def reference(context: Any) -> Any:
    """A trained network."""
    from tspc.phases.finetune import train_classifier
    from tspc.training import Progress

    model = network()
    train_classifier(model, recipe(epochs=4), context, Progress(), "pretrain")
    return model


TINY = (
    "dataset=synthetic",
    "dataset.options.train=200",
    "dataset.options.test=100",
    "dataset.pretrain.steps=4",
    "epochs=1",
    "calibration.samples=0",
    "report=false",
)
"""A run that takes a second or two."""
