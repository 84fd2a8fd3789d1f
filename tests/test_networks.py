"""Slow: a few networks of the sweep in `benchmarks.networks`, every check of it."""

from __future__ import annotations

import pytest

from benchmarks.networks import CASES, examine, row

BY_NAME = {case.name: case for case in CASES}


def test_the_sweep_has_thirty_networks_of_torchvision():
    from torchvision import models

    names = [case.name for case in CASES if case.family == "torchvision"]
    assert len(set(names)) == 30
    assert set(names) <= set(models.list_models(module=models))
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("mnasnet0_5", "svd"), ("shufflenet_v2_x0_5", "rtk"), ("resnet18", "tt")])
def test_a_network_passes_every_check(name, method, tmp_path):
    result = examine(BY_NAME[name], method, tmp_path)
    assert result["failures"] == []
    assert result["rate"] <= 0.3
    assert result["tensorized"] > 0
    assert max(result["rebuilt"], result["onnx"]) <= 1e-4
    assert row(BY_NAME[name], {method: result})[3] == "1/7 (1 run)"
