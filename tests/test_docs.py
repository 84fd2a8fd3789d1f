"""The documentation: every key of conf/ is in the reference, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tspc.decompositions import names
from tspc.run.config import TOP_LEVEL

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "docs/_site/config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def leaves(data: dict, above: str = "") -> list[str]:
    found = []
    for key, value in data.items():
        found += leaves(value, f"{above}{key}.") if isinstance(value, dict) and value else [f"{above}{key}"]
    return found


def test_every_key_is_in_the_reference(reference):
    keys = reference.keys()
    page = reference.page()
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        if "help" in path.parts:
            continue
        data = yaml.safe_load(path.read_text()) or {}
        group = path.parent.relative_to(ROOT / "conf").as_posix()
        here = [key for key in keys if key.option == (None if group == "." else path.stem)]
        here = [key for key in here if key.group == ("config" if group == "." else group)]
        wanted = leaves({key: value for key, value in data.items() if key not in ("defaults", "hydra")})
        assert len(here) == len(wanted), path
        for name in wanted:
            assert any(key.name == name or key.name.endswith(f".{name}") for key in here), (path, name)
    for key in keys:
        assert len(key.comment) > 3, key
        assert f"| `{key.name}` |" in page
    assert {key.name.partition(".")[0] for key in keys if key.group == "config"} <= set(TOP_LEVEL)


def test_the_reference_tells_type_unit_and_default(reference):
    page = reference.page()
    assert "| `checkpoint_seconds` | least time between two saves inside a phase | number | seconds | `60` |" in page
    assert (
        "| `phase.distill.memory` | MB of activations; more wait in temporary files | whole number | MB | `1024` |"
        in page
    )
    assert "| `overwrite` |" in page
    assert "| true/false |" in page


def test_a_key_without_a_meaning_is_found(reference):
    key = reference.Key("phase", "new", "phase.new.colour", 1, "", "number")
    with pytest.raises(LookupError, match=r"phase\.new\.colour .* has no meaning"):
        reference._meaning(key, {})


def test_the_table_of_methods_has_every_method_once():
    rows = (ROOT / "docs/methods.md").read_text().split("| method |")[1].split("\n\n")[0].splitlines()[2:]
    assert sorted(row.split("`")[1] for row in rows) == sorted(names())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs mkdocs-material: pip install -e '.[docs]'")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index", "results", "reference/config", "reference/api", "decomposition", "training", "looking"):
        assert (tmp_path / f"site/{page}.html").is_file()
    assert "tspc.compression.folders.load" in (tmp_path / "site/reference/api.html").read_text()
