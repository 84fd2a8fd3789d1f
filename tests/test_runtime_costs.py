"""Paths for the runtime in which a network will run, and the ratios of the benchmark of inference."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import nn

import tspc
from benchmarks.inference_rounds import RUNS, bases, ratios, rounds_of, shown, timed
from tests.conftest import TINY
from tests.nets import Net, images
from tspc.compression.path_costs import Costs
from tspc.compression.runtime_costs import WORK
from tspc.decompositions import METHODS
from tspc.deploy import RUNTIMES
from tspc.errors import ConfigError
from tspc.layers.chains import CHAIN, REBUILT
from tspc.system import extras


def test_every_runtime_has_its_costs():
    assert tuple(WORK) == RUNTIMES
    layer, method, size = nn.Conv2d(64, 64, 3, padding=1), METHODS["tk"](), {"0": (28, 28)}
    for runtime in RUNTIMES:
        costs = Costs(objective="latency", sizes=size, runtime=runtime)
        low, high = (costs.of(layer, "0", method, (rank, rank), CHAIN) for rank in (8, 48))
        assert low < costs.of(layer, "0", method, (8, 8), REBUILT)
        assert low < high


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "onnx-int8"])
def test_layers_are_timed_in_the_runtime(runtime):
    layer, method = nn.Conv2d(32, 32, 3, padding=1), METHODS["svd"]()
    costs = Costs("measure", sizes={"0": (8, 8)}, runtime=runtime)
    assert all(0 < costs.of(layer, "0", method, (4,), path) < 1 for path in (CHAIN, REBUILT))


@pytest.mark.parametrize("absent", ["openvino", "onnxruntime"])
def test_a_runtime_that_is_unknown_or_not_installed_is_one_line(monkeypatch, absent):
    with pytest.raises(ConfigError, match="^runtime=onxx: expected one of eager, compile, onnx, "):
        tspc.plan(Net(), "tt", 0.5, runtime="onxx")
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(ConfigError, match=f"^runtime=openvino-int8 with paths=measure: {absent} not installed: pip "):
        tspc.plan(Net(), "tt", 0.5, runtime="openvino-int8", paths="measure")
    assert tspc.plan(Net(), "svd", 0.5, allocation="uniform", runtime="openvino-int8", example=images()).tensorized


def test_the_runtime_is_a_setting_of_the_command(cli):
    command = (*TINY, "phase=decompose", "method=svd", "rate=0.5", "pretrained=random")
    assert cli(*command, "runtime=onnx-int8")[0] == 0
    code, _, err = cli(*command)
    assert code == 1
    assert "runtime: onnx-int8 → eager" in " ".join(err.split())


def test_ratios_are_those_of_the_same_rounds():
    assert bases("openvino-int8") == {"float32": "openvino", "int8": "openvino-int8", "onnx": "onnx"}
    assert bases("compile-bfloat16") == {"float32": "compile", "onnx": "onnx"}
    own, dense = {"onnx-int8": [1.0, 2.0]}, {"onnx": [8.0, 12.0], "onnx-int8": [2.0, 5.0]}
    assert ratios("onnx-int8", own, dense) == {"float32": [8.0, 6.0], "int8": [2.0, 2.5], "onnx": [8.0, 6.0]}
    assert shown([1.0, 2.0, 3.0]) == "2.00× (1.50 to 2.50)"
    assert shown(None) == ""


def test_all_networks_run_in_each_round():
    ran: list[str] = []
    ticks = count()
    found = rounds_of([lambda: ran.append("a"), lambda: ran.append("b")], 2, lambda: float(next(ticks)))
    assert found == [[1.0, 1.0], [1.0, 1.0]]
    once = RUNS + 1
    assert ran == ["a"] * once + ["b"] * 2 * once + ["a"] * once


def test_what_a_library_cannot_do_is_part_of_the_result():
    def own(runtime: str):
        if runtime == "onnx-int8":
            raise ValueError("no")
        return lambda: torch.zeros(1)

    found = timed(own, lambda runtime: lambda: torch.zeros(1), ["onnx", "onnx-int8"], 2, False)
    assert found["failed"] == {"onnx-int8": "ValueError: no"}
    assert set(found["own"]) == {"onnx"}
    assert set(found["dense"]) == {"onnx", "onnx-int8"}
