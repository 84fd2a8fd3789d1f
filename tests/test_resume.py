"""SIGKILL in the middle of each phase, then the same command: it finishes with the weights of an undisturbed run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

COMMAND = (
    "method=cp method.tolerance=0 method.max_iterations=300 rate=0.2 dataset.pretrain.epochs=4 epochs=4 "
    "checkpoint_seconds=0 phase.distill.least_gain=0 phase.distill.images=1024 calibration.samples=128 report=false"
).split()
RUN = "digits/resnet8/cp-0.2-max_iterations300-tolerance0/seed0"


SHORT = (
    "method=svd rate=0.2 dataset.pretrain.epochs=4 epochs=4 checkpoint_seconds=0 phase.distill.least_gain=0 "
    "phase.distill.images=512 calibration.samples=64 report=false"
).split()


def start(folder: Path, command: list[str] = COMMAND) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "tspc", *command, f"output_dir={folder}"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def records(metrics: Path) -> list[dict]:
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def reached(metrics: Path, phase: str, lines: int) -> bool:
    """Whether the phase has left at least so many lines."""
    return sum(r["phase"] == phase for r in records(metrics)) >= lines


def kill_in(phase: str, folder: Path, lines: int) -> None:
    metrics = folder / ("digits/resnet8/reference" if phase == "pretrain" else RUN) / "metrics.jsonl"
    process = start(folder)
    deadline = time.monotonic() + 120
    while not reached(metrics, phase, lines):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


def finish(folder: Path, command: list[str] = COMMAND) -> None:
    process = start(folder, command)
    _, err = process.communicate()
    assert process.returncode == 0, err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_killed_in_every_phase(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    for phase, lines in (("pretrain", 30), ("decompose", 3), ("distill", 60), ("finetune", 30)):
        kill_in(phase, killed, lines)
        done = "digits/resnet8/reference/model" if phase == "pretrain" else f"{RUN}/{phase}"
        assert not (killed / f"{done}.safetensors").exists(), "killed too late to show anything"
    finish(killed)
    for name in ("decompose", "distill", "finetune", "model"):
        expected, found = (load_file(folder / RUN / f"{name}.safetensors") for folder in (whole, killed))
        assert expected.keys() == found.keys()
        assert all(expected[k].equal(found[k]) for k in expected), f"{name}: other weights"
    resumed = [r for r in records(killed / RUN / "metrics.jsonl") if r.get("event") == "start"]
    assert max(r["seconds_before"] for r in resumed if r["phase"] == "distill") > 0, "it began anew"
    assert max(r["seconds_before"] for r in resumed if r["phase"] == "finetune") > 0, "it began anew"
    left = [p.name for p in killed.rglob("*") if "progress" in p.name or "partial" in p.name]
    assert left == [], "nothing is left over"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_killed_at_random_moments(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    finish(whole, SHORT)
    seconds = time.monotonic() - started
    moments = random.Random(0)
    for _ in range(2):
        process = start(killed, SHORT)
        try:
            process.wait(timeout=moments.uniform(0.4, 0.7) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(moments.choice([signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
    finish(killed, SHORT)
    run = "digits/resnet8/svd-0.2/seed0/model.safetensors"
    expected, found = (load_file(folder / run) for folder in (whole, killed))
    assert all(expected[k].equal(found[k]) for k in expected)
    left = [p.name for p in killed.rglob("*") if "progress" in p.name or "partial" in p.name]
    assert left == []
