"""Killed before or after any call that changes the disk: the same command ends with the same weights, and tidily."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY, Cli
from tests.killing import left_over, survives
from tspc.store.files import remove_left_over

COMMAND = (
    *(argument for argument in TINY if argument != "report=false"),
    *("phase=[pretrain,decompose,distill,finetune,export]", "phase.export.formats=[safetensors]"),
    *("phase.distill.images=64", "phase.finetune.steps=3", "checkpoint_seconds=0", "device=cpu"),
)
REFERENCE = Path("outputs/synthetic/resnet8/reference")
RUN = Path("outputs/synthetic/resnet8/tt-0.2/seed0")
DIRECTORIES = int(os.environ.get("TSPC_TEST_KILLED", "1"))


@pytest.mark.slow
def test_killed_at_any_change_of_the_disk(tmp_path, forks):
    survives(tmp_path, COMMAND, RUN, DIRECTORIES, forks)


def dead() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_the_next_command_removes_what_a_kill_left(cli: Cli, tmp_path):
    quick = [*(a for a in TINY if a != "report=false"), "phase=[pretrain,decompose]"]
    assert cli(*quick)[0] == 0
    assert cli("phase=compare")[0] == 0
    number = dead()
    left = [
        *(REFERENCE / "progress.pt", REFERENCE / "previous.progress.pt", REFERENCE / f".run.json.{number}.partial"),
        *(RUN / "decompose.progress.pt", RUN / "previous.decompose.progress.pt", RUN / "decompose.shared.safetensors"),
        *(RUN / f".result.json.{number}.partial", RUN / f"figures/.layers.svg.{number}.partial"),
        *(RUN / f"export/.model.onnx.{os.getpid()}.partial", RUN / f"export/.model.onnx.{number}.partial.data"),
    ]
    pages = [Path(f"outputs/.sweep.html.{number}.partial"), Path(f"outputs/figures/.rate.png.{number}.partial")]
    for path in left + pages:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert cli(*quick)[0] == 0
    assert [path for path in left if path.exists()] == []
    assert cli("phase=compare")[0] == 0
    assert [path for path in pages if path.exists()] == []
    assert left_over(tmp_path / "outputs") == []


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    mine, living = tmp_path / f".a.{os.getpid()}.partial", tmp_path / f".a.{os.getppid()}.partial"
    odd = tmp_path / f".a.{10**40}.partial"
    for path in (mine, living, odd):
        path.write_text("")
    remove_left_over(tmp_path, tmp_path / "none")
    assert (mine.exists(), living.exists(), odd.exists()) == (False, True, False)


@pytest.mark.parametrize("name", ["figures", "sweep.html", "sweep.csv", "figures/rate.svg"])
def test_a_page_that_cannot_be_written_is_one_line(cli: Cli, tmp_path, name):
    run = tmp_path / "outputs/d/n/tt-0.2/seed0"
    run.mkdir(parents=True)
    identity = '{"method": {"name": "tt"}, "rate": 0.2, "dataset": {"name": "d"}, "network": {"name": "n"}}'
    (run / "run.json").write_text(identity)
    result = (
        '{"rate": 0.2, "rate_reached": 0.2, "allocation": "a", "rate_scope": "s", "network": "n", "device": "cpu", '
        '"reference": {"accuracy": null, "source": "x"}, "phases": {"decompose": {"accuracy": {"top1": 0.5, '
        '"images": 10}, "seconds": 1}}, "accuracy": {"top1": 0.5, "images": 10}, "parameters": {"before": 2, '
        '"after": 1}, "bytes": {"before": 8, "after": 4}, "seed": 0, "versions": {}}'
    )
    (run / "result.json").write_text(result)
    assert cli("phase=compare") == (0, "compared   outputs/sweep.html\n", ""), "without top5, as well"
    assert (run / "report.html").exists()
    path = tmp_path / "outputs" / name
    if name == "figures":
        for figure in path.iterdir():
            figure.unlink()
        path.rmdir()
        path.write_text("in the way")
    else:
        path.unlink()
        path.mkdir()
    code, _, err = cli("phase=compare")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"tspc: cannot {'create' if name == 'figures' else 'write'} outputs/{name}: ")


def test_a_folder_that_may_not_be_written_is_one_line(cli: Cli, tmp_path, monkeypatch):
    run = tmp_path / "outputs/d/n/tt-0.2/seed0"
    run.mkdir(parents=True)
    (run / "run.json").write_text(
        '{"method": {"name": "tt"}, "rate": 0.2, "dataset": {"name": "d"}, "network": {"name": "n"}}'
    )

    make = Path.mkdir

    def refuse(path: Path, *arguments: object, **named: object) -> None:
        if path.name == "figures":
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = cli("phase=compare")
    assert (code, err.count("\n")) == (1, 1)
    assert "tspc: cannot create outputs/figures: Permission denied; the page stands beside the runs" in err


def test_a_full_disk_where_a_package_writes_is_one_line(cli: Cli, monkeypatch):
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tspc.run.pipeline.load_data", full)
    code, _, err = cli(*TINY)
    assert (code, err) == (
        1,
        "tspc: cannot use outputs: No space left on device; solve this, then run the same command again\n",
    )
