"""Slow: a real data set end to end, and the wheel outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_fashion_mnist_resnet8_rcp(cli, tmp_path, fashion_mnist):
    steps = ("dataset.pretrain.steps=60", "phase.distill.steps=10", "phase.finetune.steps=10", "eval_samples=500")
    steps += ("batch_size=64", "calibration.samples=128", "phase.distill.images=320", "phase.finetune.held_out=200")
    code, _, err = cli(
        "dataset=fashion_mnist", "model=resnet8", f"data_dir={fashion_mnist}", "method=rcp", "rate=0.2", *steps
    )
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "outputs/fashion_mnist/resnet8/rcp-0.2/seed0/result.json").read_text())
    assert result["rate_reached"] <= 0.2
    assert result["accuracy"]["images"] == 10000
    assert result["phases"]["decompose"]["accuracy"]["top1"] > 0.3, "no step of training yet"
    assert result["accuracy"]["top1"] > 0.4


@pytest.mark.slow
def test_the_default_run_keeps_its_promise(cli, tmp_path):
    code, _, err = cli()
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "outputs/digits/resnet8/tt-0.2/seed0/result.json").read_text())
    assert result["accuracy"]["top1"] > result["reference"]["accuracy"]["top1"] - 0.02


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("tspc-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    assert (site / "tspc/conf/method/tt.yaml").is_file()
    assert (site / "tspc/py.typed").is_file()
    assert (site / "tspc/pages/templates/report.html").is_file()
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = "import tspc; print(tspc.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=work, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(site))
    arguments = ["dataset=synthetic", "dataset.options.train=200", "dataset.options.test=100", "epochs=1"]
    arguments += ["dataset.pretrain.steps=2", "calibration.samples=32", "phase.distill.images=64"]
    command = [sys.executable, "-m", "tspc", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (work / "outputs/synthetic/resnet8/tt-0.2/seed0/result.json").is_file()
    assert (work / "outputs/synthetic/resnet8/tt-0.2/seed0/report.html").is_file()
