"""A method of somebody else's: its settings, its entry point, its files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tspc
from tests.conftest import TINY
from tests.test_tutorial import DOCS, blocks
from tspc.decompositions import METHODS, Axes, Decomposition, from_dict, register, registry
from tspc.decompositions.laws import DecompositionLaws
from tspc.decompositions.registry import ENTRY_POINTS
from tspc.errors import ConfigError, WeightsError
from tspc.layers.forms import tensorize, tensorized_layers


@dataclass(frozen=True)
class Projected(Decomposition):
    """The kernel on the R largest directions of its inputs: a method with the least that a method needs."""

    name: ClassVar[str] = "projected"
    scale: float = 1.0
    flipped: bool = False

    def max_rank(self, shape):
        return (math.prod(shape[1:]),)

    def factor_shapes(self, shape, rank):
        return ((shape[0], *rank), (*rank, math.prod(shape[1:])))

    def axes(self, shape):
        modes = dict(zip("shw", shape[1:], strict=False))
        return Axes({"t": shape[0]}, modes, ((("t",), ()), ((), tuple(modes))))

    def fit(self, weight, rank):
        matrix = weight.flatten(1)
        basis = torch.linalg.svd(matrix, full_matrices=False).Vh[: rank[0]]
        basis = torch.cat((basis, basis.new_zeros(rank[0] - len(basis), basis.shape[1])))
        return matrix @ basis.T, basis

    def contract(self, tensors, shape):
        return (tensors[0] @ tensors[1]).reshape(shape)

    def unfoldings(self, weight):
        return (weight.flatten(1),)


class TestLawsOfAStrangersMethod(DecompositionLaws):
    method = Projected()


def in_the_guide() -> dict[str, Any]:
    """What the code in the guide defines, as it stands there."""
    found: dict[str, Any] = {}
    for block in blocks("methods.md"):
        exec(compile(block, "docs/methods.md", "exec", dont_inherit=True), found)
    return found


GUIDE = in_the_guide()


class TestLawsOfTheMethodInTheGuide(DecompositionLaws):
    method = GUIDE["TestMine"].method


@pytest.mark.parametrize("balanced", [True, False])
def test_the_method_in_the_guide_is_the_truncated_svd_and_runs_as_a_chain(balanced):
    method = GUIDE["Mine"](balanced)
    # With 9 outputs the first factor's entries would be exactly half as large, and chance would scale them or not.
    layer = torch.nn.Conv2d(6, 10, (3, 2), padding=1).double()
    small = tensorize(layer, method, (4,))
    matrix = layer.weight.detach().flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(small.weight.flatten(1), left[:, :4] * values[:4] @ right[:4])
    assert [factor.shape for factor in small.factor_tensors()] == [(4, 6, 3, 2), (10, 4, 1, 1)]
    assert small.paths == ["chain", "rebuilt"]
    norms = [float(factor.detach().norm()) for factor in small.factor_tensors()]
    assert (norms[0] == pytest.approx(norms[1])) == balanced


@pytest.mark.slow
def test_the_run_in_the_guide(cli, tmp_path, monkeypatch):
    (command,) = re.findall(r"^    tspc --config-dir DIR (method=.*)$", (DOCS / "methods.md").read_text(), re.MULTILINE)
    monkeypatch.setitem(METHODS._made, "mine", (GUIDE["Mine"], {"balanced": True}))
    (tmp_path / "DIR/method").mkdir(parents=True)
    (tmp_path / "DIR/method/mine.yaml").write_text("name: mine\nbalanced: true\n")
    small = [word for word in TINY if not word.startswith("dataset.pretrain")]
    code, _, err = cli("--config-dir", "DIR", *small, *command.split())
    assert code == 0, err
    (result,) = Path("try").glob("synthetic/resnet8/mine-0.2/seed0/result.json")
    assert list(json.loads(result.read_text())["phases"]) == ["decompose", "distill", "finetune"]


@pytest.fixture
def offered(monkeypatch):
    """Makes packages that offer the method by entry points of these names; they can be removed."""

    def offer(*names):
        found = {name: EntryPoint(name, f"{__name__}:Projected", ENTRY_POINTS) for name in names}
        monkeypatch.setattr(registry, "entry_points", lambda group, name: [found[name]] if name in found else [])

    yield offer
    METHODS._made.pop("projected", None)


@pytest.fixture
def installed(offered):
    offered("projected")


@pytest.mark.usefixtures("installed")
def test_a_method_of_another_package_is_found_by_its_name():
    assert from_dict({"name": "projected", "scale": 2.0}) == Projected(2.0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 30), torch.nn.Linear(30, 2))
    assert tspc.compress(model, "projected", 0.5)[1].decomposition == Projected()


def test_a_yaml_file_cannot_name_a_class():
    with pytest.raises(ConfigError, match="method 'tests.test_own_methods:Projected' is unknown"):
        from_dict({"name": "tests.test_own_methods:Projected"})


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="'svd' is registered already"):
        registry.METHODS.add("svd", Projected, {})


@pytest.mark.usefixtures("installed")
def test_a_truth_value_is_a_setting():
    assert from_dict({"name": "projected", "flipped": True}) == Projected(flipped=True)
    for value in (1, "true", None):
        with pytest.raises(ConfigError, match=r"method\.flipped=.*: expected true or false"):
            from_dict({"name": "projected", "flipped": value})
    with pytest.raises(ConfigError, match=r"method\.scale=true: expected a number"):
        from_dict({"name": "projected", "scale": True})


@pytest.mark.usefixtures("installed")
def test_a_truth_value_in_a_run(cli, tmp_path):
    (tmp_path / "mine/method").mkdir(parents=True)
    (tmp_path / "mine/method/projected.yaml").write_text("name: projected\nflipped: false\n")
    arguments = ("--config-dir", "mine", *TINY, "method=projected", "phase=decompose", "pretrained=random", "rate=0.5")
    assert cli(*arguments, "method.flipped=true")[0] == 0
    run = tmp_path / "outputs/synthetic/resnet8/projected-0.5-flippedtrue/seed0"
    found = tensorized_layers(tspc.load(run / "model.safetensors")).values()
    assert {layer.decomposition for layer in found} == {Projected(flipped=True)}
    code, _, err = cli(*arguments, "method.flipped=3")
    assert code == 1
    assert "method.flipped=3: expected true or false" in err


@pytest.mark.parametrize(
    ("kind", "default"),
    [
        (tuple, field(default=(1, 2))),
        (float | None, field(default=None)),
        (list, field(default_factory=list)),
        (int, field(kw_only=True)),
    ],
    ids=["tuple", "None", "factory", "no default"],
)
def test_a_setting_of_another_kind_is_refused_when_it_is_registered(kind, default):
    other = dataclass(frozen=True)(
        type("Other", (Projected,), {"__annotations__": {"depth": kind}, "name": "other", "depth": default})
    )
    message = (
        r"method\.depth of other: a setting has a default that is a whole number, a number, a text or a truth value"
    )
    with pytest.raises(ConfigError, match=message):
        register()(other)
    assert "other" not in METHODS


def test_an_entry_point_of_another_name_is_told(offered):
    offered("mine")
    message = f"the entry point 'mine' gives {__name__}:Projected, whose name is 'projected'; make both names equal"
    with pytest.raises(ConfigError, match=message):
        from_dict({"name": "mine"})
    assert "projected" not in METHODS


def test_a_file_tells_which_method_is_missing(offered, tmp_path):
    path = tmp_path / "small.safetensors"
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 30), torch.nn.Linear(30, 2))
    tspc.save(tspc.compress(model, Projected(2.0), 0.5), path)
    message = (
        r"small\.safetensors: it was made with method 'projected', which is not registered: "
        r"install its package, or call tspc\.decompositions\.register\(\)\(CLASS\) first$"
    )
    with pytest.raises(WeightsError, match=message):
        tspc.load(path, model)
    offered("projected")
    assert tspc.load(path, model)[1].decomposition == Projected(2.0)
