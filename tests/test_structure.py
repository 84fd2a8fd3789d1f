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

FOLDERS = (
    "errors system decompositions quantization store models data layers traversal calibration training deploy "
    "compression terminal phases pages run cli"
).split()
"""Each imports only from those to its left; files inside of one import one way, too."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path, lazily: bool = True) -> set[str]:
    """Modules of tspc that a file imports, without "tspc."; `lazily` counts imports inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazily else iter(tree.body)
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("tspc.") for name in names if name.startswith("tspc.")} - {"__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_those_to_its_left(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    # The sweep's callback is loaded by Hydra and reaches the pages only when a sweep has ended.
    for other in {name.split(".")[0] for name in imported(path)} - {own}:
        assert FOLDERS.index(other) < FOLDERS.index(own), f"{own} must not import {other}"


def test_every_folder_has_its_place_and_the_package_stays_surveyable():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*FOLDERS, "__init__", "__main__", "py.typed"}
    assert len(entries) <= 21


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_a_folder_import_one_way(folder):
    files = {f"{folder}.{path.stem}": path for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"}
    needs = {name: imported(path, lazily=False) & set(files) for name, path in files.items()}
    while ready := [name for name, others in needs.items() if not others & set(needs)]:
        for name in ready:
            del needs[name]
    assert not needs, f"these import each other: {', '.join(needs)}"


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda p: p.name)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 300


def test_only_the_command_knows_hydra_and_only_the_configuration_omegaconf():
    for path in SOURCES:
        text = path.read_text()
        if path.name not in ("cli.py", "sweep.py"):
            assert "import hydra" not in text
            assert "from hydra" not in text
        if path.name != "cli.py" and path.parent.name != "run":
            assert "import omegaconf" not in text
            assert "from omegaconf" not in text


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
    # The attribute is set already if something else has imported the folder.
    assert tspc.__getattr__("decompositions") is sys.modules["tspc.decompositions"]
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
