"""Run directories: nothing old is passed off as new, nothing new is lost, and a full disk is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tspc
from tests.conftest import TINY
from tspc.errors import RunError
from tspc.models import NetworkSpec
from tspc.store.directory import RunDirectory
from tspc.store.records import differences

RUN = "outputs/synthetic/resnet8/tt-0.2/seed0"


def test_differences_name_the_leaves():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == ["a.b: 1 → 3", "c: 2 → None", "d: None → 4"]


def test_an_identity_without_results_can_be_replaced(tmp_path):
    with RunDirectory(tmp_path / "run", {"a": 1}):
        pass
    with RunDirectory(tmp_path / "run", {"a": 2}) as run:
        run.file("decompose.safetensors").write_text("")
    with pytest.raises(RunError, match="a: 2 → 1"), RunDirectory(tmp_path / "run", {"a": 1}):
        pass
    with RunDirectory(tmp_path / "run", {"a": 1}, overwrite=True) as run:
        assert not run.file("decompose.safetensors").exists(), "results of another identity are gone at once"


def test_the_loser_of_a_race_leaves_the_winner_alone(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with RunDirectory(path, {"a": 1}):
        monkeypatch.setattr(RunDirectory, "_create", lambda self: [path])
        with pytest.raises(RunError, match="in use"), RunDirectory(path, {"a": 1}):
            pass
        assert {".lock", "run.json", "tspc.log"} <= set(os.listdir(path))


def weights(seed: int, path: Path) -> str:
    torch.manual_seed(seed)
    torch.save(NetworkSpec("builtin", "resnet8", 10).build().state_dict(), path)
    return f"pretrained={path}"


def test_other_weights_are_never_taken_for_these(cli, tmp_path):
    a, b = weights(1, tmp_path / "a.pt"), weights(2, tmp_path / "b.pt")
    assert cli(*TINY, a)[0] == 0
    code, _, err = cli(*TINY, b)
    assert code == 1
    assert "reference.file" in err
    code, _, err = cli(*TINY, b, "phase=finetune", "overwrite=true")
    assert code == 1
    assert "run phase=[decompose,finetune]" in err, "overwriting does not make b's decomposition"
    first = tspc.load(tmp_path / RUN / "decompose.safetensors").conv1.weight
    assert cli(*TINY, b, "overwrite=true", "phase=decompose")[0] == 0
    assert os.path.exists(tmp_path / RUN / "decompose.safetensors")
    assert not torch.equal(tspc.load(tmp_path / RUN / "decompose.safetensors").conv1.weight, first)
    assert not os.path.exists(tmp_path / RUN / "finetune.safetensors"), "a's finetuned network is not b's"


@pytest.mark.slow
def test_a_killed_overwrite_leaves_no_false_claim(cli, tmp_path, monkeypatch):
    assert cli(*TINY)[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr("tspc.run.reference.train_classifier", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*TINY, "dataset.pretrain.steps=5", "overwrite=true")[0] == 130
    code, out, _ = cli(*TINY, "dataset.pretrain.steps=5", "overwrite=true")
    assert code == 0
    assert "pretrain  5 steps" in out, "the old reference is not passed off as the new one"


def test_a_failed_command_claims_nothing(cli):
    assert cli(*TINY)[0] == 0
    code, _, err = cli(*TINY, "method=svd", "dataset.pretrain.steps=5")
    assert code == 1
    assert "dataset.pretrain" not in err or "recipe.steps: 4 → 5" in err
    assert cli(*TINY, "method=svd")[0] == 0


def test_an_earlier_phase_does_not_silently_outdate_a_later_one(cli, tmp_path):
    assert cli(*TINY, "phase=[pretrain,decompose,finetune]")[0] == 0
    before = (tmp_path / RUN / "finetune.safetensors").read_bytes()
    code, _, err = cli(*TINY)
    assert code == 1
    assert "would be outdated" in err
    assert (tmp_path / RUN / "finetune.safetensors").read_bytes() == before
    assert cli(*TINY, "overwrite=true")[0] == 0


@pytest.mark.slow
def test_variants_keep_runs_apart(cli, tmp_path):
    variant = "variant=lr${phase.finetune.learning_rate}"
    code, out, _ = cli("-m", *TINY, "phase.finetune.learning_rate=0.01,0.02", variant)
    assert code == 0
    assert {"tt-0.2-lr0.01", "tt-0.2-lr0.02", "reference"} == set(os.listdir(tmp_path / "outputs/synthetic/resnet8"))
    assert "tt-0.2-lr0.02/seed0" in out[out.index("Sweep") :]


def test_accuracy_is_measured_once_there_is_data(cli, tmp_path):
    given = weights(1, tmp_path / "a.pt")
    folder = ("dataset=imagefolder", "dataset.num_classes=10", "model=resnet8", given, "calibration.samples=0")
    assert cli(*folder, "phase=decompose")[0] == 0
    result = tmp_path / "outputs/imagefolder/resnet8/tt-0.2/seed0/result.json"
    assert json.loads(result.read_text())["accuracy"] is None
    from tests.test_data import write_images

    write_images(tmp_path / "data", size=32, classes=[f"c{i}" for i in range(10)], count=3)
    assert cli(*folder, "phase=decompose", f"data_dir={tmp_path / 'data'}")[0] == 0
    assert json.loads(result.read_text())["accuracy"]["images"] == 30


def test_a_sweep_that_cannot_start_leaves_nothing(cli, tmp_path):
    for arguments in (["method=svd,tucker"], ["rat=0.1,0.2"]):
        code, _, err = cli("-m", *arguments)
        assert code == 1
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
    code, _, err = cli("-m", "rate=0.1,0.2", "output_dir=/dev/null")
    assert code == 1
    assert "choose another output_dir" in err


LIMITED = """
import os, resource, signal, sys
limit = int(sys.argv.pop(1))
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from tspc.cli import main
main()
"""


@pytest.mark.parametrize("limit", [pytest.param(limit, marks=pytest.mark.slow) for limit in (3000, 30000)] + [0])
def test_a_file_size_limit_is_one_line(tmp_path, forks, limit):
    """Writes fail as on a full disk, in the lock, the log, the metrics or the weights."""
    (tmp_path / "run").mkdir()
    if limit:
        process = forks.start("-c", LIMITED, str(limit), *TINY, folder=tmp_path / "run")
        _, err = process.communicate()
        code = process.wait()
    else:  # not even its message could be written to a file
        command = [sys.executable, "-c", LIMITED, "0", *TINY]
        done = subprocess.run(command, cwd=tmp_path / "run", stderr=subprocess.PIPE, text=True)
        code, err = done.returncode, done.stderr
    assert code == 1
    assert err.startswith("tspc: cannot write")
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.partial"))
