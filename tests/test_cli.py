"""The command as a user types it: whole runs, sweeps, and one clear line for every mistake."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

import tspc
from tests.conftest import TINY
from tspc.decompositions import names
from tspc.store.directory import RunDirectory


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_whole_run_and_what_it_leaves(cli, tmp_path):
    code, out, err = cli(*TINY, "method=tk", "rate=0.4")
    assert (code, err) == (0, "")
    run = tmp_path / "outputs/synthetic/resnet8/tk-0.4/seed0"
    files = "decompose distill finetune model".split()
    assert {f"{name}.safetensors" for name in files} < set(os.listdir(run))
    assert {"result.json", "metrics.jsonl", "tspc.log", "run.json"} < set(os.listdir(run))
    result = json.loads((run / "result.json").read_text())
    assert list(result["phases"]) == ["decompose", "distill", "finetune"]
    assert result["rate_reached"] <= result["rate"] == 0.4
    assert 0 <= result["accuracy"]["top1"] <= 1
    assert result["reference"]["accuracy"]["images"] == 100
    assert torch.__version__.startswith(result["versions"]["torch"])
    model = tspc.load(run / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]["after"]
    assert result["bytes"]["file"] == (run / "model.safetensors").stat().st_size
    for text in ("layer1.0.conv1", "dense: first", "layer3.0", "0.4 asked"):
        assert text in out
    assert "\x1b" not in out, "no colour codes in a pipe"
    assert "finetune" in (run / "tspc.log").read_text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {r["phase"] for r in records} == {"decompose", "distill", "finetune"}

    before = {name: (run / f"{name}.safetensors").read_bytes() for name in files}
    code, out, err = cli(*TINY, "method=tk", "rate=0.4")
    assert code == 0
    assert out.count("done before") == 3
    assert before == {name: (run / f"{name}.safetensors").read_bytes() for name in files}


@pytest.mark.slow
def test_phases_one_after_the_other_equal_all_at_once(cli, tmp_path):
    assert cli(*TINY, "method=svd")[0] == 0
    for phase in ("pretrain", "decompose", "distill", "finetune"):
        assert cli(*TINY, "method=svd", f"phase={phase}", "output_dir=apart")[0] == 0
    together, apart = (tmp_path / d / "synthetic/resnet8/svd-0.2/seed0" for d in ("outputs", "apart"))
    ours, theirs = (tspc.load(run / "model.safetensors").state_dict() for run in (together, apart))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert list(json.loads((apart / "result.json").read_text())["phases"]) == ["decompose", "distill", "finetune"]


def test_a_finished_result_survives_an_earlier_phase_asked_again(cli, tmp_path):
    cli(*TINY)
    model = tmp_path / "outputs/synthetic/resnet8/tt-0.2/seed0/model.safetensors"
    before = tspc.load(model).state_dict()
    assert cli(*TINY, "phase=decompose")[0] == 0
    after = tspc.load(model).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_other_settings_are_refused_with_the_difference_and_redone_on_request(cli, tmp_path):
    assert cli(*TINY)[0] == 0
    run = tmp_path / "outputs/synthetic/resnet8/tt-0.2/seed0"
    before = (run / "finetune.safetensors").read_bytes()
    code, _, err = cli(*TINY, "phase.finetune.learning_rate=0.5")
    assert code == 1
    assert "phase.finetune.learning_rate: 0.003 → 0.5" in err
    code, _, err = cli(*TINY, "pretrained=random")
    assert code == 1
    assert "reference" in err
    assert "overwrite=true" in err
    assert (run / "finetune.safetensors").read_bytes() == before
    assert cli(*TINY, "phase.finetune.learning_rate=0.5", "overwrite=true", "phase=finetune")[0] == 0
    assert (run / "finetune.safetensors").read_bytes() != before


@pytest.mark.slow
def test_sweep_shares_the_reference_and_survives_a_failing_job(cli, tmp_path):
    phases = "phase=[pretrain,decompose,finetune]"
    code, out, err = cli("-m", *TINY, phases, "method=svd,rtt", "rate=0.4,0.001", "eval_samples=20")
    assert code == 1
    assert out.count("pretrain  4 steps") == 1, "one reference for all jobs"
    assert err.count("cannot be met") == 2
    table = out[out.index("Sweep") :]
    assert table.count("FAILED") == 2
    assert "method=svd rate=0.4" in table
    assert len(list(tmp_path.glob("outputs/multirun/*/job-*.json"))) == 4
    assert len(list(tmp_path.glob("outputs/synthetic/resnet8/*/seed0/result.json"))) == 2


def test_a_quiet_sweep_says_nothing(cli, tmp_path):
    code, out, err = cli("-m", *TINY, "method=svd,tt", "phase=[pretrain,decompose]", "verbosity=quiet")
    assert (code, out, err) == (0, "", "")
    assert len(list(tmp_path.glob("outputs/multirun/*/sweep.html"))) == 1


@pytest.mark.parametrize(
    ("method", "network"),
    [("svd", "resnet18"), pytest.param("rcp", "resnet50", marks=pytest.mark.slow)],
)
def test_decomposing_from_weights_alone(cli, tmp_path, method, network):
    arguments = ("phase=decompose", "model=torchvision", f"model.name={network}", "pretrained=random", "rate=0.05")
    code, out, err = cli(*arguments, f"method={method}", "allocation=uniform")
    assert (code, err) == (0, "")
    assert "random initial weights" in out
    result = json.loads((tmp_path / f"outputs/imagenet/{network}/{method}-0.05-uniform/seed0/result.json").read_text())
    assert 0.045 < result["rate_reached"] <= 0.05
    assert result["accuracy"] is None


def test_own_configs_and_own_network(cli, tmp_path, monkeypatch):
    (tmp_path / "mine/method").mkdir(parents=True)
    (tmp_path / "mine/method/rcp3.yaml").write_text("name: rcp\norder: 3\n")
    (tmp_path / "mine/phase").mkdir()
    (tmp_path / "mine/phase/quick.yaml").write_text("finetune: {epochs: 1, batch_size: 50, learning_rate: 0.01}\n")
    (tmp_path / "net3.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),\n"
        "    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = ("model=custom", "model.factory=net3:net")
    phases = "phase=[pretrain,decompose,quick]"
    code, _, err = cli("--config-dir", "mine", *TINY, "method=rcp3", *network, phases, "rate=0.5")
    assert (code, err) == (0, "")
    run = tmp_path / "outputs/synthetic/net/rcp-0.5-order3/seed0"
    assert (run / "finetune.safetensors").exists()
    with pytest.raises(tspc.TspcError, match="pass the architecture"):
        tspc.load(run / "model.safetensors")
    import net3

    tspc.load(run / "model.safetensors", model=net3.net())
    assert cli(*network, "phase=decompose", "rate=0.5")[0] == 0, "without a data set: weights only"


MISTAKES = {
    "method=tucker": f"method=tucker does not exist; choose one of {', '.join(sorted(names()))} (or",
    "dataset=cifar": "choose one of cifar10",
    "phase=train": "phase=train does not exist; choose one of",
    "rat=0.1": "did you mean rate?",
    "phase.finetune.epoch=1": "did you mean phase.finetune.epochs?",
    "rate=0": "rate=0: expected a number above 0",
    "rate=-1": "rate=-1: expected",
    "rate=1.5": "rate=1.5: expected",
    "rate=nan": "rate=nan: expected",
    "rate=0.0001": "smallest feasible rate",
    "dataset=imagefolder": "needs data_dir",
    "data_dir=nowhere dataset=imagefolder": "data_dir=nowhere: there is no such folder",
    "pretrained=nowhere.pt": "there is no such file",
    "pretrained=default": "has no published weights",
    "model.name=resnet9": "did you mean",
    "device=cuda:77": "cannot be used here",
    "device=toaster": "cannot be used here",
    "phase=finetune": "run phase=[decompose,finetune]",
    "output_dir=/dev/null": "choose another output_dir",
    "dataset.num_classes=7": "has 10 classes",
    "phase=distill dataset=none model=resnet20": "needs data",
    "phase.finetune.learning_rate=fast": "phase.finetune.learning_rate=fast: expected a number",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_get_one_line_and_change_nothing(cli, tmp_path, arguments):
    code, _, err = cli(*arguments.split())
    assert code == 1
    assert MISTAKES[arguments] in err
    assert err.startswith("tspc: ")
    assert err.count("\n") == 1
    assert tree(tmp_path) == []


def test_a_misspelt_key_in_a_file_is_found(cli, tmp_path):
    (tmp_path / "mine/dataset").mkdir(parents=True)
    (tmp_path / "mine/dataset/typo.yaml").write_text("defaults: [digits]\nchanels: 3\n")
    code, _, err = cli("--config-dir", "mine", "dataset=typo")
    assert code == 1
    assert "dataset.chanels is not a setting; did you mean dataset.channels?" in err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("finetune.epochs=5", "phase.finetune.epochs"),
        ("phases.finetune.epochs=5", "phase.finetune.epochs"),
        ("samples=64", "calibration.samples"),
        ("images=64", "phase.distill.images or contract.images"),
        ("rate.x=1", "rate"),
    ],
)
def test_a_key_without_its_group_is_found(cli, argument, meant):
    code, _, err = cli(argument)
    assert code == 1
    assert f"tspc: {argument.split('=')[0]} is not a setting; did you mean {meant}? known here: dataset, model," in err


def test_weights_that_do_not_fit(cli, tmp_path):
    torch.save(tspc.models.NetworkSpec("builtin", "resnet8", 7, 1).build().state_dict(), tmp_path / "seven.pt")
    code, _, err = cli("pretrained=seven.pt")
    assert code == 1
    assert "linear.bias (7,) instead of (10,)" in err
    assert tree(tmp_path) == ["seven.pt"]


def test_a_second_run_in_the_same_directory_is_refused(cli, tmp_path):
    path = tmp_path / "outputs/synthetic/resnet8/tt-0.2/seed0"
    with RunDirectory(path, {"busy": True}):
        code, _, err = cli(*TINY)
    assert code == 1
    assert f"is in use by another run (process {os.getpid()})" in err


def test_a_full_disk(cli, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tspc.store.files.os.fsync", full)
    code, _, err = cli(*TINY)
    assert code == 1
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert [p for p in tree(tmp_path) if p.endswith(".safetensors")] == []


def test_a_loss_that_is_not_finite_keeps_the_phase_before(cli, tmp_path):
    code, _, err = cli(*TINY, "phase.finetune.optimizer=sgd", "phase.finetune.learning_rate=1e6", "epochs=3")
    assert code == 1
    assert "finetune: the loss became" in err
    run = tmp_path / "outputs/synthetic/resnet8/tt-0.2/seed0"
    assert "distill.safetensors" in err
    assert (run / "distill.safetensors").exists()
    assert not (run / "model.safetensors").exists()


CALIBRATED = (
    *TINY[:-1],
    "calibration.samples=24",
    "calibration.batch_size=8",
    "phase.decompose.exclude=[layer1*,layer2*]",
)


def test_the_default_run_calibrates_and_shares_its_curves(cli, tmp_path):
    assert cli(*CALIBRATED, "method=svd", "rate=0.3", "phase=decompose")[0] == 0
    code, _, err = cli(*CALIBRATED, "method=svd", "rate=0.2", "phase=decompose")
    assert (code, err) == (0, "")
    assert len(list(tmp_path.glob("outputs/synthetic/resnet8/reference/curves-*.json"))) == 1
    result = json.loads((tmp_path / "outputs/synthetic/resnet8/svd-0.2/seed0/result.json").read_text())
    assert 0 < result["output_error"] < 1
    code, _, err = cli(*CALIBRATED, "method=svd", "rate=0.2", "phase=decompose", "calibration.samples=16")
    assert code == 1
    assert "calibration.samples: 24 → 16" in err


def test_a_plan_is_shown_and_nothing_else_done(cli, tmp_path):
    code, out, err = cli(*TINY, "method=auto", "method.candidates=[svd,tt]", "phase=plan", "rate=0.3")
    assert (code, err) == (0, "")
    for text in ("Plan: auto at rate 0.3", "Rates", "network MACs", "0.05", "0.4"):
        assert text in out
    (row,) = (line for line in out[out.index("Rates, as expected") :].splitlines() if line.startswith("│  0.3"))
    assert 0 < float(row.split("│")[5]) < 1
    assert os.listdir(tmp_path / "outputs/synthetic/resnet8") == ["reference"]


@pytest.mark.parametrize(
    ("sweep", "goals"), [((), ("rate=0.1", "target_error=0.5")), (("-m",), ("rate=0.1,0.2", "target_error=0.5"))]
)
def test_a_rate_beside_a_target_error_is_refused(cli, tmp_path, sweep, goals):
    code, _, err = cli(*sweep, *TINY, "method=svd", "phase=decompose", *goals)
    assert code == 1
    assert err == f"tspc: {' and '.join(goals)} are two goals; leave one of them out\n"
    assert not os.listdir(tmp_path)


def test_a_target_error_names_the_directory(cli, tmp_path):
    code, out, err = cli(*TINY, "method=svd", "target_error=0.5", "phase=[plan,decompose]")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "outputs/synthetic/resnet8/svd-error0.5/seed0/result.json").read_text())
    assert 0 < result["rate_reached"] <= result["rate"] < 1
    assert f"{result['rate']:g}" in out[out.index("Rates, as expected") :]
