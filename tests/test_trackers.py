"""Trackers are told what goes into metrics.jsonl; sweeps run on several cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import TINY
from tspc.run.trackers import measurements


def test_names_of_measurements():
    record = {"phase": "distill", "block": "layer1.0", "step": 3, "loss": 0.5}
    assert measurements(record) == {"distill/layer1.0/step": 3.0, "distill/layer1.0/loss": 0.5}


def test_tensorboard_has_the_losses(cli):
    code, _, err = cli(*TINY, "tracker=tensorboard", "phase.finetune.steps=3")
    assert code == 0, err
    run = next(Path("outputs").rglob("result.json")).parent
    events = EventAccumulator(str(run / "tspc"))
    events.Reload()
    noted = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in noted if record["phase"] == "finetune" and "loss" in record]
    assert [round(e.value, 4) for e in events.Scalars("finetune/loss")] == [round(loss, 4) for loss in losses]


def test_a_tracker_that_is_not_installed(cli):
    code, _, err = cli(*TINY, "tracker=mlflow")
    assert (code, err) == (1, "tspc: tracker=mlflow: its package is not installed; pip install 'tspc[mlflow]'\n")


@pytest.mark.slow
def test_a_sweep_on_two_cores(cli):
    code, out, err = cli("-m", "hydra/launcher=cores", *TINY, "phase=[pretrain,decompose]", "rate=0.2,0.3")
    assert code == 0, err
    assert len(list(Path("outputs").rglob("result.json"))) == 2
    assert "0.3" in out, "the table at the end"
