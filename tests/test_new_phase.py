"""A phase is its own file, a YAML and a row of the table: everything else follows."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

import tspc
from tests.conftest import TINY
from tspc.phases.phase import DeliveryPhase, NetworkPhase
from tspc.phases.table import DELIVERY_PHASES, NETWORK_PHASES, PHASES


@dataclass(frozen=True)
class Scaling:
    by: float = 0.5

    def problems(self, where):
        return [] if self.by > 0 else [f"{where}.by={self.by}: expected a number above 0"]


def scale(work):
    with torch.no_grad():
        next(work.start.parameters()).mul_(work.settings.by)
    return work.start, None


def largest(work):
    return {"largest": float(next(work.start.parameters()).detach().abs().max())}


@pytest.fixture
def new_phases(monkeypatch, tmp_path):
    scaling = NetworkPhase("scale", Scaling, run=scale)
    showing = DeliveryPhase("largest", run=largest, schema={"largest": float})
    for table, phase in ((NETWORK_PHASES, scaling), (DELIVERY_PHASES, showing)):
        monkeypatch.setitem(table, phase.name, phase)
        monkeypatch.setitem(PHASES, phase.name, phase)
    folder = tmp_path / "conf" / "phase"
    folder.mkdir(parents=True)
    (folder / "scale.yaml").write_text("scale:\n  by: 0.5\n")
    (folder / "largest.yaml").write_text("largest: {}\n")
    return ("--config-dir", str(tmp_path / "conf"), *TINY, "method=svd", "rate=0.4")


def test_a_row_of_the_table_is_enough(cli, new_phases, tmp_path):
    run = tmp_path / "outputs/synthetic/resnet8/svd-0.4/seed0"
    code, out, err = cli(*new_phases, "phase=[pretrain,decompose,scale,largest]")
    assert (code, err) == (0, "")
    before, after = (tspc.load(run / f"{name}.safetensors") for name in ("decompose", "scale"))
    assert torch.equal(next(after.parameters()), next(before.parameters()) / 2)
    result = json.loads((run / "result.json").read_text())
    assert list(result["phases"]) == ["decompose", "scale"]
    assert result["largest"] == {"largest": pytest.approx(float(next(after.parameters()).detach().abs().max()))}
    assert json.loads((run / "largest.json").read_text())["found"] == result["largest"]

    code, out, _ = cli(*new_phases, "phase=[scale,largest]")
    assert code == 0
    assert out.count("done before") == 2

    code, _, err = cli(*new_phases, "phase=scale", "phase.scale.by=0.25")
    assert code == 1
    assert "phase.scale.by: 0.5 → 0.25" in err
    code, _, err = cli(*new_phases, "phase=scale", "phase.scale.by=-1.0")
    assert "phase.scale.by=-1.0: expected a number above 0" in err
