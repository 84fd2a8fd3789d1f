"""Damaged records: what can be made again is, the rest is one line, and one run takes no other along."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, Cli, Once
from tests.damage import BYTES, VALUES, change, damage
from tspc.errors import RunError
from tspc.pages.records import Broken, Run, find_runs, read_run
from tspc.store.files import read_json
from tspc.store.records import failure, read_metrics
from tspc.store.schemas import FINISHED, IDENTITY, JOB, METRICS, PLAN, RESULT, problem
from tspc.training import Progress

COMMAND = (*TINY, "phase=[pretrain,decompose]")
RUN = Path("outputs/synthetic/resnet8/tt-0.2/seed0")
REFERENCE = Path("outputs/synthetic/resnet8/reference")


@pytest.fixture
def run(once: Once, cli: Cli, tmp_path: Path) -> Cli:
    """The command, in a folder that holds two finished runs with an allocation by error curves."""

    def make(folder: Path) -> None:
        assert cli(*COMMAND)[0] == 0
        assert cli(*COMMAND, "method=svd")[0] == 0
        shutil.move(tmp_path / "outputs", folder)

    shutil.copytree(once("damaged", make) / "outputs", tmp_path / "outputs")
    return cli


def said(outcome: tuple[int, str, str]) -> str:
    """What a command that succeeded or was refused in one line says."""
    code, out, err = outcome
    assert code in (0, 1)
    assert "Traceback" not in err + out
    if code == 1:
        assert err.startswith("tspc: ")
        assert err.count("\n") == 1, err
        assert "unexpected" not in err
    else:
        assert err == ""
    return out + err


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_directory_is_mended_or_refused_in_one_line(run, seed):
    damage(Path("outputs"), random.Random(seed))
    said(run(*COMMAND))
    said(run("phase=compare"))


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (lambda r: r["accuracy"].pop("top1"), "accuracy.top1 is missing"),
        (lambda r: r["accuracy"].update(images=0), "accuracy.images: expected a whole number"),
        (lambda r: r["parameters"].update(after=10**400), "parameters.after: expected a whole number"),
        (lambda r: r.update(rate="a half"), "rate: expected a number, at least"),
        (lambda r: r.update(phases=[]), "phases: expected a mapping, found a list of 0"),
        (lambda r: r["phases"]["decompose"].update(seconds=float("nan")), "phases.decompose.seconds"),
        (lambda r: r.update(versions=VALUES[-1]), "deeper than 50 levels"),
    ],
)
def test_a_damaged_result_is_refused_with_the_reason(run, damaged: Callable[[dict], object], reason):
    result = json.loads((RUN / "result.json").read_text())
    damaged(result)
    (RUN / "result.json").write_text(json.dumps(result))
    with pytest.raises(RunError) as refused:
        read_run(RUN)
    assert reason in str(refused.value)


def test_damaged_runs_are_shown_with_the_reason_beside_the_others(run):
    path = RUN / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": {"top1": 0.5, "images": 0}}))
    said(run("phase=compare"))
    found = {row["run"]: row for row in csv.DictReader(Path("outputs/sweep.csv").read_text().splitlines())}
    assert {name: row["status"] for name, row in found.items()} == {"tt-0.2": "damaged", "svd-0.2": "done"}
    assert "accuracy.images: expected a whole number, at least 1, found 0" in found["tt-0.2"]["error"]
    assert "svd-0.2" in Path("outputs/sweep.html").read_text()


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_record_of_other_bytes_takes_no_other_along(run, name):
    svd = Path("outputs/synthetic/resnet8/svd-0.2/seed0")
    for content in (*BYTES, None):
        if content is None:
            (RUN / name).unlink()
            (RUN / name).mkdir()
        else:
            (RUN / name).write_bytes(content)
        found = find_runs("outputs")
        assert [each.path for each in found if isinstance(each, Run)] == [svd]
        broken = [each for each in found if isinstance(each, Broken)]
        # A run.json without a method is a reference network's.
        assert [each.status for each in broken] == ["damaged"] * ((name, content) != ("run.json", b"{}"))
    assert "it is no file" in broken[0].error


def test_side_files_are_made_again(run):
    metrics = RUN / "metrics.jsonl"
    lines = metrics.read_text()
    metrics.write_bytes(b"null\n5\n[]\n\xff\xfe\n" + lines.encode() + b'{"half')
    assert read_metrics(RUN) == [json.loads(line) for line in lines.splitlines()]
    accuracies, curves = sorted(REFERENCE.glob("accuracy-*.json")), sorted(REFERENCE.glob("curves-*.json"))
    before = [path.read_text() for path in accuracies + curves]
    for path, content in zip(accuracies + curves, ("{}", "[]", "{}"), strict=True):
        path.write_text(content)
    for method, folder in (("tt", RUN), ("svd", Path("outputs/synthetic/resnet8/svd-0.2/seed0"))):
        shutil.rmtree(folder)
        assert "is damaged; it is made anew" in said(run(*COMMAND, f"method={method}"))
    assert [path.read_text() for path in accuracies + curves] == before


def test_a_line_after_half_a_line_is_not_lost(run):
    (RUN / "metrics.jsonl").write_bytes(b'{"event": "start"}\n{"half')
    said(run(*COMMAND, "overwrite=true"))
    records = read_metrics(RUN)
    assert records[0] == {"event": "start"}
    assert records[1]["event"] == "start"
    assert records[1]["phase"] == "decompose"


def test_a_failure_without_a_reason_is_one():
    assert failure([{"event": "failed"}]) == "for a reason that is not noted"


def test_a_stage_without_what_it_should_tell_is_refused_and_can_be_made_anew(run):
    from safetensors.torch import save_file

    from tspc.compression import checkpoint

    path = RUN / "decompose.safetensors"
    header, state = checkpoint.read(path)
    for key in ("seconds", "fingerprint", "plan"):
        info = {name: value for name, value in header["info"].items() if name != key}
        save_file(state, path, {"tspc": json.dumps(header | {"info": info})})
        wrong = f"the header of {path} is damaged ({key} is missing); remove the file, or pass overwrite=true"
        assert f"tspc: {wrong}" in said(run(*COMMAND))
    said(run(*COMMAND, "overwrite=true"))
    assert checkpoint.read_header(path)["info"].keys() == header["info"].keys()


def test_a_reference_without_its_seconds_is_still_one(run):
    from safetensors.torch import save_file

    from tspc.compression import checkpoint

    path = REFERENCE / "model.safetensors"
    header, state = checkpoint.read(path)
    header["info"] = {"seconds": "three"}
    save_file(state, path, {"tspc": json.dumps(header)})
    assert run(*COMMAND)[0] == 0
    assert json.loads((RUN / "result.json").read_text())["reference"]["seconds"] is None


@pytest.mark.parametrize("saved", [{}, {"settings": "s"}, {"settings": "s", "stage": 0, "state": {}}, [1]])
def test_progress_that_is_not_whole_gives_way_to_the_one_before(tmp_path, saved):
    path = tmp_path / "finetune.progress.pt"
    before = Progress(path, "s")
    before.save(3, {"a": torch.ones(2)})
    path.rename(tmp_path / "previous.finetune.progress.pt")
    torch.save(saved, path)
    found = Progress(path, "s")
    assert found.part == 3
    assert found.warning is not None
    assert not path.exists()


def test_progress_with_a_flipped_bit_is_not_gone_on_with(tmp_path):
    path = tmp_path / "progress.pt"
    Progress(path, "s").save(1, {"a": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(content)
    assert Progress(path, "s").state_of(1) is None


def test_a_state_of_another_training_is_one_line(tmp_path):
    progress = Progress(tmp_path / "progress.pt", "s")
    with pytest.raises(RunError, match="no state of this training .*remove it"), progress.restoring():
        torch.nn.Linear(2, 2).load_state_dict({})


@pytest.mark.parametrize("schema", [RESULT, IDENTITY, METRICS, PLAN, FINISHED, JOB, [JOB]])
def test_a_schema_takes_anything_and_says_what_is_wrong(schema):
    for value in VALUES:
        found = problem(value, schema)
        assert found is None or (0 < len(found) < 120)
    chance = random.Random(0)
    data = {"job": 1, "overrides": ["a=1"], "result": None, "error": "none"}
    assert problem(data, JOB) is None
    for _ in range(100):
        changed = json.loads(json.dumps(data))
        change(changed, chance)
        problem(changed, schema)


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(RunError, match="it is no file"):
        read_json(tmp_path / "result.json")
