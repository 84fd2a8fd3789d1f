"""Several processes share the layers of phase 0: the same bits as from one, and an error in one is raised in all."""

from __future__ import annotations

import json

import pytest

from tests.test_processes import launch
from tspc.system import processes

WORKER = """
import json
import sys
import torch
from torch import nn
import tspc
from tspc.compression import curves, fits
from tspc.errors import TspcError
from tspc.system import processes

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
own, found = processes.rank(), {}
torch.manual_seed(0)
norm = nn.BatchNorm2d(12)
nn.init.uniform_(norm.running_mean)
first, second, wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, bias=False), nn.Conv2d(12, 16, 1)
model = nn.Sequential(first, nn.ReLU(), second, norm, nn.ReLU(), wide, nn.Flatten(), nn.Linear(64, 10)).eval()
images = torch.randn(24, 3, 6, 6)
options = {"method": "tk", "rate": 0.5, "keep_first": False, "keep_last": False}
seen = []


def watched(module, name):
    before = getattr(module, name)

    def watching(*given):
        seen.append(name)
        return before(*given)

    setattr(module, name, watching)


watched(fits, "_fitted")
watched(curves, "_curves")
calls = {
    "weights": {},
    "outputs": {"calibration": images, "settings": tspc.Calibration(batch_size=8, compensate=False)},
    "integers": {
        "calibration": images,
        "settings": tspc.Calibration(batch_size=8, compensate=False),
        "bits": 4,
    },
    "in turn": {"calibration": images, "settings": tspc.Calibration(batch_size=8)},
}
for name, more in calls.items():
    told = [[], []]
    seen.clear()
    alone = tspc.compress(model, **options, **more, on_layer=told[0].append).eval()
    works = [[seen.count(kind) for kind in ("_curves", "_fitted")]]
    seen.clear()
    shared = tspc.compress(model, **options, **more, on_layer=told[1].append, spread=True).eval()
    one, other = alone.state_dict(), shared.state_dict()
    same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    same = same and torch.equal(alone(images), shared(images))
    works.append([seen.count(kind) for kind in ("_curves", "_fitted")])
    found[name] = {"same": same, "works": works, "told": [sorted(names) for names in told]}
plans = [tspc.plan(model, **options, **calls["outputs"], spread=spread) for spread in (False, True)]
found["plans"] = plans[0] == plans[1]


def fails(name):
    if own == 1 and name == failing:
        raise ValueError(f"no {name}")


def attempt(**changes):
    try:
        tspc.compress(model, **options | changes, on_layer=fails, spread=True)
    except Exception as error:
        return [type(error).__name__, str(error)]


failing = "7"
found["error"] = attempt()
failing = None
found["other layers"] = attempt(exclude=["2"] if own == 1 else [])
tspc.compress(model, **options) if own == 0 else None  # without `spread` no process waits for another one
try:
    processes.by_first(lambda: fails(None) or int("x"))
except Exception as error:
    found["first"] = [type(error).__name__, str(error)]
found["result"] = processes.by_first(lambda: own + 5)
processes.wait()
with open(f"{sys.argv[1]}/{own}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_processes_share_layers_and_errors(tmp_path):
    launch(2, "-c", WORKER, str(tmp_path), folder=tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name in ("weights", "outputs", "in turn"):
        parts = [found[name] for found in ranks]
        assert all(part["same"] for part in parts), f"{name}: not the same bits"
        assert all(part["told"][0] == part["told"][1] for part in parts), f"{name}: every layer is told in each process"
        alone, shared = zip(*(part["works"] for part in parts), strict=True)
        curves, fitted = alone[0]
        assert alone == ([4, fitted], [4, fitted])
        assert sorted(of_rank[0] for of_rank in shared) in ([1, curves - 1], [2, curves - 2])
        fits = [of_rank[1] for of_rank in shared]
        assert fits == [fitted, fitted] if name == "in turn" else sum(fits) == fitted, f"{name}: no layer is done twice"
    assert all(found["plans"] for found in ranks)
    assert ranks[1]["error"] == ["ValueError", "no 7"]
    assert ranks[0]["error"] == ["TspcError", "process 1: no 7"]
    for found in ranks:
        assert found["other layers"][0] == "TspcError"
        assert "give all the same arguments" in found["other layers"][1]
        assert found["result"] == 5
    assert ranks[0]["first"][0] == "ValueError"
    assert ranks[1]["first"] == ["TspcError", f"process 0: {ranks[0]['first'][1]}"]


@pytest.mark.parametrize("count", [2, 3])
def test_parts_are_of_about_the_same_size(count, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: count)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(processes._part([5, 9, 1, 7, 3, 2], size=float))
    assert sorted(item for part in parts for item in part) == [1, 2, 3, 5, 7, 9]
    sums = [sum(part) for part in parts]
    assert max(sums) - min(sums) <= 1, "27 in two or three parts"


def test_one_process_does_everything_itself():
    with processes.sharing():
        assert not processes.is_shared()
        found = processes.spread([3, 1], float, lambda items: {str(item): 2 * item for item in items})
    assert found == {"3": 6, "1": 2}
