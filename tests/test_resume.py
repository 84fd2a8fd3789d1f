"""SIGKILL or SIGTERM in the middle of each phase, then the same command: it ends with the weights of a whole run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.forking import Fork, Forks

COMMAND = (
    "method=cp method.tolerance=0 method.max_iterations=60 rate=0.2 dataset.pretrain.epochs=2 epochs=2 "
    "checkpoint_seconds=0 phase.distill.least_gain=0 phase.distill.images=512 calibration.samples=128 report=false "
    "allocation=uniform"
).split()
RUN = "digits/resnet8/cp-0.2-max_iterations60-tolerance0-uniform/seed0"


def start(folder: Path, forks: Forks) -> Fork:
    return forks.start("-m", "tspc", *COMMAND, f"output_dir={folder}", folder=folder.parent)


def records(metrics: Path) -> list[dict]:
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def reached(metrics: Path, phase: str, lines: int) -> bool:
    """Whether the phase has left at least so many lines."""
    return sum(r["phase"] == phase for r in records(metrics)) >= lines


def kill_in(phase: str, folder: Path, lines: int, how: signal.Signals, forks: Forks) -> None:
    metrics = folder / ("digits/resnet8/reference" if phase == "pretrain" else RUN) / "metrics.jsonl"
    process = start(folder, forks)
    deadline = time.monotonic() + 120
    while not reached(metrics, phase, lines):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    assert process.wait() in (-how, 128 + how)


@pytest.mark.slow
def test_killed_in_every_phase(tmp_path, forks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # A process of its own, as a user starts it, for it has other hashes than the others.
    command = [sys.executable, "-m", "tspc", *COMMAND, f"output_dir={whole}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    kill, stop = signal.SIGKILL, signal.SIGTERM
    for phase, lines, how in (
        ("pretrain", 15, kill),
        ("decompose", 3, kill),
        ("distill", 30, stop),
        ("finetune", 15, kill),
    ):
        kill_in(phase, killed, lines, how, forks)
        done = "digits/resnet8/reference/model" if phase == "pretrain" else f"{RUN}/{phase}"
        assert not (killed / f"{done}.safetensors").exists(), "killed too late to show anything"
    process = start(killed, forks)
    _, err = process.communicate()
    assert process.returncode == 0, err
    for name in ("decompose", "distill", "finetune", "model"):
        expected, found = (load_file(folder / RUN / f"{name}.safetensors") for folder in (whole, killed))
        assert expected.keys() == found.keys()
        assert all(expected[k].equal(found[k]) for k in expected), f"{name}: other weights"
    resumed = [r for r in records(killed / RUN / "metrics.jsonl") if r.get("event") == "start"]
    assert max(r["seconds_before"] for r in resumed if r["phase"] == "distill") > 0, "it began anew"
    assert max(r["seconds_before"] for r in resumed if r["phase"] == "finetune") > 0, "it began anew"
    left = [p.name for p in killed.rglob("*") if "progress" in p.name or "partial" in p.name]
    assert left == [], "nothing is left over"
