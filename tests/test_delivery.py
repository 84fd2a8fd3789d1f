"""phase=export and phase=benchmark: on a run that is there, within one, and again."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.test_configs import read
from tspc.errors import ConfigError
from tspc.pages.records import DONE, FAILED, read_run
from tspc.system import extras

RUN = (*TINY, "method=svd", "rate=0.3")
QUICK = ("phase.benchmark.seconds=0", "phase.benchmark.runtimes=[eager]", "phase.benchmark.batch_sizes=[1,4]")


def directory(tmp_path: Path) -> Path:
    return tmp_path / "outputs/synthetic/resnet8/svd-0.3/seed0"


@pytest.mark.slow
def test_a_run_is_exported_and_measured_after_it_was_made(cli, tmp_path):
    assert cli(*RUN, "phase=[pretrain,decompose]")[0] == 0
    run = directory(tmp_path)
    before = json.loads((run / "result.json").read_text())
    code, out, err = cli(*RUN, "phase=[export,benchmark]", *QUICK)
    assert (code, err) == (0, "")
    for text in ("model.onnx", "model.pt2", "model.safetensors", "test images", "Latency", "multiply-accumulates"):
        assert text in out
    result = json.loads((run / "result.json").read_text())
    assert {key: result[key] for key in before} == before, "also the command and the settings that made the network"
    assert [file["file"] for file in result["export"]["files"]] == ["model.onnx", "model.pt2", "model.safetensors"]
    assert all((run / "export" / file["file"]).stat().st_size == file["bytes"] for file in result["export"]["files"])
    assert all(file["relative"] <= 1e-4 for file in result["export"]["files"])
    assert [(t["runtime"], t["batch_size"]) for t in result["benchmark"]["timings"]] == [("eager", 1), ("eager", 4)]
    costs = result["benchmark"]["cost"]
    assert costs["compressed"]["macs"] < costs["dense"]["macs"]
    assert costs["compressed"]["parameters"] == result["parameters"]["after"]
    assert json.loads((run / "benchmark.json").read_text())["found"] == result["benchmark"]

    files = {path: path.stat().st_mtime_ns for path in (run / "export").iterdir()}
    code, out, err = cli(*RUN, "phase=[export,benchmark]", *QUICK)
    assert (code, err) == (0, "")
    assert out.count("done before") == 2
    assert "Latency" in out
    assert files == {path: path.stat().st_mtime_ns for path in (run / "export").iterdir()}

    # What follows makes another network: what is known of the old one is not said of the new one.
    code, out, _ = cli(*RUN, "phase=finetune", "phase.finetune.steps=1")
    assert code == 0
    assert "benchmark.json is of an earlier network; phase=benchmark makes it anew" in out
    result = json.loads((run / "result.json").read_text())
    assert {"export", "benchmark"}.isdisjoint(result)
    assert "phase=finetune" in result["command"]
    assert read_run(run).benchmark == {}  # type: ignore[union-attr]

    # Nor do files of both lie side by side, or damaged records keep anything from being made anew.
    (run / "benchmark.json").write_text('{"state": ')
    (run / "result.json").write_text("{")
    code, out, err = cli(*RUN, "phase=[export,benchmark]", "phase.export.formats=[safetensors]", *QUICK)
    assert (code, err) == (0, "")
    assert [path.name for path in (run / "export").iterdir()] == ["model.safetensors"]
    assert json.loads((run / "benchmark.json").read_text())["found"]["timings"]


def test_beyond_the_tolerance_nothing_is_kept_but_the_run(cli, tmp_path):
    options = ("phase=[pretrain,decompose,export]", "phase.export.formats=[onnx]", "phase.export.tolerance=0")
    code, _, err = cli(*RUN, *options)
    assert code == 1
    assert err.count("\n") == 1
    assert "model.onnx was not kept: its answers differ" in err
    run = directory(tmp_path)
    assert list((run / "export").iterdir()) == []
    assert "export" not in json.loads((run / "result.json").read_text())
    assert (run / "model.safetensors").exists()
    # A failure is over once a command succeeds.
    assert read_run(run).status == FAILED  # type: ignore[union-attr]
    assert cli(*RUN, "phase=export", "phase.export.formats=[safetensors]")[0] == 0
    assert read_run(run).status == DONE  # type: ignore[union-attr]


def test_without_data_random_images_are_tried(cli, tmp_path):
    options = ("dataset=cifar10", "pretrained=random", "model=resnet8", "calibration.samples=0", "method=svd")
    code, out, err = cli(*options, "phase=[decompose,export]", "phase.export.formats=[pt2]")
    assert (code, err) == (0, "")
    assert "random images" in out


def test_what_is_missing_is_told_before_any_work(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    code, _, err = cli(*RUN, "phase=[pretrain,decompose,export]")
    assert code == 1
    assert err == (
        "tspc: the export to ONNX (formats=[pt2,safetensors] leaves it out) needs the extra onnx; "
        "onnxruntime not installed: pip install 'tspc[onnx]'\n"
    )
    assert not (tmp_path / "outputs").exists()
    code, _, err = cli(*RUN, "phase=export", "phase.export.formats=[pt2]")
    assert code == 1
    assert "phase=export needs a decomposed network of these settings" in err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phase.export.formats=[tflite]", "phase.export.formats=.*choose from onnx, pt2, safetensors, int8"),
        ("phase.export.tolerance=-1", "phase.export.tolerance=-1: expected a number of at least 0"),
        ("phase.export.formats=onnx", r"phase.export.formats=onnx: expected a list, as in \[…\]"),
        ("phase.benchmark.batch_sizes=[0]", r"batch_sizes=\[0\]: expected whole numbers of at least 1"),
        (
            "phase.benchmark.batch_sizes=[half]",
            r"batch_sizes=\['half'\]: expected a list in which each item is a whole number",
        ),
        ("phase.benchmark.runtimes=[tensorrt]", "phase.benchmark.runtimes=.*expected a list of eager, compile, onnx"),
    ],
)
def test_wrong_settings(override, message):
    with pytest.raises(ConfigError, match=message):
        read("phase=[export,benchmark]", override)
