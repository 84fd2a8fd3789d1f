"""Options and helpers that the tests share."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.forking import Forks
from tests.quick import make_hydra_quick, make_onnx_quick

SHARED = os.environ.get("TSPC_TEST_DATA")
"""A folder with data/ and weights/ for the tests on real weights; `.ci/run` sets it where there is one."""


OWN_PROCESS = "TSPC_TEST_OWN_PROCESS"
"""In the new process of the tests that are marked so: the folder that it shares with the others."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure() -> None:
    # Before PyTorch is imported, here or in a command that a test starts: the workers share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    gc.disable()  # the imports make a million objects, and no garbage


def pytest_collection_finish() -> None:
    gc.set_threshold(700, 10, 50)  # to look through all of them takes half a second
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is marked `own_process` in a new pytest, together with all others of this session: once.

    Once OpenVINO has run in a process of pytest, the next signal to this process may be a segmentation fault.
    """
    if pyfuncitem.get_closest_marker("own_process") is None or OWN_PROCESS in os.environ:
        return None
    folder = shared_folder(pyfuncitem._request.getfixturevalue("tmp_path_factory"))
    found = folder / "own-process.txt"
    with FileLock(f"{found}.lock"):
        if not found.exists():
            files = {str(item.path) for item in pyfuncitem.session.items if item.get_closest_marker("own_process")}
            command = [sys.executable, "-m", "pytest", "-q", "-n0", "--slow", "-m", "own_process", *sorted(files)]
            environment = os.environ | {OWN_PROCESS: str(folder)}
            done = subprocess.run(
                command, env=environment, cwd=pyfuncitem.config.rootpath, capture_output=True, text=True
            )
            found.write_text(f"{done.returncode}\n{done.stdout[-8000:]}{done.stderr[-1000:]}")
    code, _, text = found.read_text().partition("\n")
    assert code == "0", text
    return True


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of all workers."""
    if OWN_PROCESS in os.environ:
        return Path(os.environ[OWN_PROCESS])
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "slow" not in item.keywords)  # so that no worker ends with a slow one
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the folder that `make(folder)` has filled, once for all workers. It is only read."""
    base = shared_folder(tmp_path_factory)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts processes that need not import tspc."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


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
    from tests.small import context_of

    return context_of()


@pytest.fixture
def reference(once: Once) -> Any:
    """A trained network."""
    from safetensors.torch import load_file

    from tests.small import network, save_trained

    model = network()
    model.load_state_dict(load_file(once("reference", save_trained) / "model.safetensors"))
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


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times that a test measures are not kept for the user, and measured briefly."""
    from tspc.compression import layer_times, network_times, time_plans

    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_times, "cache_folder", lambda: folder)
        patch.setattr(layer_times, "REPEATS", 3)
        for module in (network_times, time_plans):
            patch.setattr(module, "SECONDS", 0.05)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_packages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_hydra_quick(patch)
        make_onnx_quick(patch)
        yield
