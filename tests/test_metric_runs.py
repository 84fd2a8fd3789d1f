"""Whole runs that are judged by another metric than top-1: records, pages, exported files, a second time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tspc.phases.export as phase
from tests.conftest import TINY
from tspc.phases.export import Export, export_files
from tspc.phases.inputs import Example
from tspc.training import METRICS

RUN = "outputs/synthetic/resnet8/svd-0.2/seed0"
COMMAND = (*TINY, "method=svd", "phase=[decompose,finetune]", "phase.finetune.steps=2", "report=true")
OWN = """
import torch

def surety(model, batches):
    return torch.cat([model(images).softmax(1).amax(1) for images, _ in batches]) * 5

def silly(model, batches):
    return "very"
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    (tmp_path / "ownmetric.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "ownmetric", raising=False)
    return "ownmetric"


@pytest.mark.slow
def test_runs_by_default_by_agreement_and_by_a_function(cli, tmp_path, own):
    code, _, err = cli(*COMMAND)
    assert (code, err) == (0, "")
    identity = json.loads((tmp_path / RUN / "run.json").read_text())
    assert "metric" not in identity
    result = json.loads((tmp_path / RUN / "result.json").read_text())
    assert list(result["accuracy"]) == ["top1", "top5", "images"]

    code, _, err = cli(*COMMAND, "metric=agreement")
    assert code == 1
    assert "metric: top1 → agreement" in " ".join(err.split())
    for metric, variant, label in (
        ("agreement", "a", "Agreement with the reference"),
        (f"{own}:surety", "s", "surety"),
    ):
        command = (*COMMAND, f"metric={metric}", f"variant={variant}")
        code, out, err = cli(*command)
        assert (code, err) == (0, "")
        assert f"{label.split()[0].lower()} " in out
        folder = tmp_path / RUN.replace("0.2", f"0.2-{variant}")
        assert json.loads((folder / "run.json").read_text())["metric"] == metric
        result = json.loads((folder / "result.json").read_text())
        for record in (result["accuracy"], result["reference"]["accuracy"], result["phases"]["finetune"]["accuracy"]):
            assert list(record) == ["metric", "value", "images"]
            assert (record["metric"], record["images"]) == (metric, 100)
        page = (folder / "report.html").read_text()
        assert label in page
        assert "op-1" not in page
        before = (folder / "result.json").read_bytes()
        code, out, err = cli(*command)
        assert (code, err) == (0, "")
        assert out.count("done before: ") == 2
        assert (folder / "result.json").read_bytes() == before
    references = Path(tmp_path / RUN).parent.parent / "reference"
    assert len(list(references.glob("accuracy-*.json"))) == 3

    assert cli("phase=compare")[0] == 0
    page = (tmp_path / "outputs/sweep.html").read_text()
    for heading in ("resnet8 on synthetic<", "judged by agreement with the reference<", "judged by surety<"):
        assert heading in page, "each metric has a section, and figures, of its own"
    head, *rows = (tmp_path / "outputs/sweep.csv").read_text().splitlines()
    assert [row.split(",")[head.split(",").index("metric")] for row in rows] == ["top1", "agreement", f"{own}:surety"]


def test_a_bad_function_is_told_before_any_work(cli, tmp_path, own):
    code, _, err = cli(*COMMAND, f"metric={own}:silly")
    assert code == 1
    assert "metric=ownmetric:silly returned str; it gets (model, batches) and returns a number" in " ".join(err.split())
    assert "Traceback" not in err
    code, _, err = cli(*COMMAND, "metric=ownmetric:missing")
    assert code == 1
    assert "metric='ownmetric:missing' cannot be imported" in " ".join(err.split())
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(("name", "told"), [("cosine", "points of cosine"), ("mse", "in squared error")])
def test_an_exported_file_is_judged_by_the_metric(reference, context, tmp_path, monkeypatch, capsys, name, told):
    object.__setattr__(context, "metric", METRICS[name])
    real = phase.opened
    monkeypatch.setattr(phase, "opened", lambda *args: lambda inputs: [-real(*args)(inputs)[0]])
    images = next(context.data.calibration_batches(4, 4, context.device))
    example, settings = Example((images,), "training images"), Export(("pt2",), eval_samples=50)
    network = reference.eval()
    found = export_files(network, settings, example, lambda: [], tmp_path, context, reference)
    own, file = found["accuracy"], found["files"][0]["accuracy"]
    assert own["value"] == pytest.approx(1.0 if name == "cosine" else 0.0)
    assert file["value"] == pytest.approx(-1.0) if name == "cosine" else file["value"] > 0.01
    text = " ".join(capsys.readouterr().out.split())
    assert "model.pt2 loses" in text
    assert f"{told} against the network" in text
    assert f"accuracy_tolerance=0.01 allows {1 if name == 'cosine' else 0.01:g}" in text


DENSE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), block(), block(), nn.Conv2d(16, 5, 1))
"""


@pytest.mark.parametrize("metric", ["cosine", "mse", "agreement"])
def test_a_network_without_classes_is_compressed_and_judged(cli, tmp_path, monkeypatch, metric):
    """It gives five maps for an image; only a comparison with the reference can judge it."""
    (tmp_path / "densenet5.py").write_text(DENSE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "densenet5", raising=False)
    command = [option for option in TINY if "pretrain" not in option]
    command += ["model=custom", "model.factory=densenet5:net", "pretrained=default", "method=svd", "rate=0.3"]
    command += ["phase=[decompose,distill]", "phase.distill.steps=4"]
    code, _, err = cli(*command)
    assert code == 1
    assert "the data has 10 classes" in " ".join(err.split())
    code, _, err = cli(*command, f"metric={metric}")
    assert (code, err) == (0, "")
    result = json.loads(next((tmp_path / "outputs").rglob("result.json")).read_text())
    assert result["reference"]["accuracy"]["value"] == pytest.approx(0.0 if metric == "mse" else 1.0)
    values = [result["phases"][name]["accuracy"]["value"] for name in ("decompose", "distill")]
    if metric == "agreement":
        assert all(0.8 < value < 1 for value in values)
    else:
        assert values[1] < values[0] if metric == "mse" else values[1] > values[0]
