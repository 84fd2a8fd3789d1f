"""The shape of the code: imports point one way, files stay small, the command starts without PyTorch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tspc"

LAYERS = [
    ["errors", "launch", "modes", "schemas"],
    ["bounds"],
    ["batches", "checklist", "copying", "extras", "files", "hooks", "interrupts", "nested", "parallel", "processes"],
    ["lazy", "state", "trackers"],
    ["sweep", "display", "decompositions", "models", "data", "stash"],
    ["arguments", "links"],
    ["dense"],
    ["tensorized"],
    ["blocks", "layers", "header", "training", "plans"],
    ["replacing"],
    ["norms"],
    ["deploy", "moments", "patches", "paths", "selection", "spectra", "walk"],
    ["inference", "sensitivity"],
    ["calibration"],
    ["batch_norm", "curves", "refit", "targets"],
    ["allocation"],
    ["planning"],
    ["compression"],
    ["checkpoint"],
    ["phases"],
    ["config", "report", "runs"],
    ["pages"],
    ["reference", "delivery"],
    ["stages"],
    ["pipeline"],
    ["cli"],
]
"""From the bottom up: a module imports only from layers below its own (or, within a package, from the package)."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path, lazily: bool = True) -> set[str]:
    """Top-level parts of tspc that a file imports; `lazily` counts imports inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazily else iter(tree.body)
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" if node.module == "tspc" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        names |= {name.split(".")[1] for name in full if name.startswith("tspc.")} - {"__version__"}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    # The sweep's callback is loaded by Hydra and reaches up only when a sweep has ended.
    for other in imported(path, lazily=own != "sweep") - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} must not import {other}"


def test_every_module_has_a_layer():
    names = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in SOURCES} - {"__init__", "__main__"}
    assert names == set(LEVEL)


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda p: p.name)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 300


def test_only_the_command_knows_hydra_and_only_the_configuration_omegaconf():
    for path in SOURCES:
        text = path.read_text()
        if path.name not in ("cli.py", "sweep.py"):
            assert "import hydra" not in text
            assert "from hydra" not in text
        if path.name not in ("cli.py", "sweep.py") and path.parent.name != "config":
            assert "omegaconf" not in text.lower() or path.name == "report.py"


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["-sc", "query=bash"], ["--version"]])
def test_answers_without_importing_torch(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['tspc', *{arguments!r}]\n"
        "from tspc.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "COMP_LINE": "tspc method=", "COMP_POINT": "12", "_HYDRA_MAIN_": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    import tspc

    for name in tspc.__all__:
        assert getattr(tspc, name) is not None
    assert set(tspc.__all__) <= set(dir(tspc))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tspc.nothing  # noqa: B018


def test_the_project_speaks_of_itself_alone():
    """No absolute paths of a machine in what is shipped."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", "") and path.is_file() and path != Path(__file__):
            assert not re.search(r"(?<![\w.])/(home|root|work|Users|tmp)/", path.read_text()), name
