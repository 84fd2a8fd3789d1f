"""Runs with a contract: what was asked, promised and measured, from the command to the page; and the frontier."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

import tspc
from tests.conftest import TINY
from tspc.compression.goals import contradiction, goal_of, seconds_of
from tspc.compression.settings import PlanSettings
from tspc.data import DataSpec, Feed, load_data
from tspc.data.base import held_out_indices, training_order
from tspc.errors import ConfigError, DataError
from tspc.pages.goals import goal_in, kind_of_goal, order_of_goal, readable_goal
from tspc.phases import judging
from tspc.phases.context import Context
from tspc.run import contract
from tspc.terminal.display import Display
from tspc.training import TOP1, Hardware

DROP = (
    *("dataset=synthetic", "dataset.options.train=800", "dataset.options.test=100", "dataset.pretrain.steps=40"),
    *("calibration.samples=64", "method=svd", "max_drop=5", "epochs=1"),
)
"""A run with a limit on the drop, whose reference is right on nearly every image."""
FOLDER = "outputs/synthetic/resnet8/svd-drop5"


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_a_drop_is_promised_measured_and_kept(cli, tmp_path, monkeypatch):
    code, out, err = cli(*DROP, "phase=decompose")
    assert (code, err) == (0, "")
    folder = tmp_path / FOLDER / "seed0"
    result = result_in(folder)
    (goal,) = result["contract"]["goals"]
    assert goal["goal"] == "max_drop=5"
    assert goal["kept"]
    drop = result["contract"]["drop"]
    assert drop["points"] <= drop["bound"] <= 5
    assert drop["bound"] == drop["bound_promised"]
    final = result["accuracy"]["top1"]
    assert drop["test"] == pytest.approx(100 * (result["reference"]["accuracy"]["top1"] - final))
    assert result["bytes"]["after"] < 0.1 * result["bytes"]["before"]
    assert "contract   max_drop=5: promised at most" in out
    page = (folder / "report.html").read_text()
    assert page.index("max_drop=5") < page.index("Top-1 accuracy")
    assert "with confidence 95 %" in page
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tried = [line for line in lines if line.get("event") == "tried"]
    assert [line["share"] for line in tried if line["passed"]]
    # The same command again measures nothing.
    monkeypatch.setattr(contract, "contract_of", None)
    code, _, err = cli(*DROP, "phase=decompose")
    assert (code, err) == (0, "")
    assert result_in(folder)["contract"] == result["contract"]


@pytest.mark.slow
def test_after_a_training_other_images_judge_and_later_runs_learn(cli, tmp_path):
    short = ("phase=[decompose,finetune]", "phase.finetune.steps=3", "phase.finetune.held_out=100", "report=false")
    code, out, err = cli(*DROP, *short)
    assert code == 0
    assert "no earlier run tells how much of a drop this training gives back" in out
    result = result_in(tmp_path / FOLDER / "seed0")
    found = result["contract"]["drop"]
    assert found["bound_promised"] is None
    assert found["inputs"] == 120  # of a fifth of 800 images a quarter was the pilot
    assert (found["bound"] <= 5) == found["kept"]
    assert ("broken" in err) == (not found["kept"])
    (known,) = (tmp_path / "outputs/synthetic/resnet8/reference").glob("drops-*.json")
    ((_, after),) = json.loads(known.read_text())
    assert after == found["points"]
    known.write_text("[[2.0, 1.0]]")
    code, out, _ = cli(*DROP, *short, "seed=1")
    assert code == 0
    assert "no earlier run" not in out
    assert json.loads(known.read_text())[0] == [2.0, 1.0]
    assert len(json.loads(known.read_text())) == 2


def test_what_training_gave_back():
    settings = PlanSettings.of("svd", max_drop=1.0)
    known = judging.Judging(settings, None, True, [(10.0, 5.0), (1.0, 0.1), (0.0, 1.0)])
    assert known.given_back(8.0) == pytest.approx(4.0)
    assert known.given_back(2.0) == pytest.approx(0.2)
    assert known.given_back(-1.0) == -1.0
    assert judging.Judging(settings, None, True, []).given_back(2.0) == 2.0
    assert judging.Judging(settings, None, True, [(1.0, 3.0)]).given_back(2.0) == 2.0


def test_reserved_images_are_never_trained_on():
    data = load_data(DataSpec("synthetic", "s", 10, 3, 16, (0.5,), (0.25,), options={"train": 200, "test": 20}))
    feed = Feed(10, 0, torch.device("cpu"), held_out=20, reserved=50)
    trained = set(training_order(200, feed, 0).tolist())
    own, kept = set(held_out_indices(200, 20, 50).tolist()), set(held_out_indices(200, 50).tolist())
    assert (len(trained), len(own), len(kept)) == (130, 20, 50)
    assert not trained & own
    assert not (trained | own) & kept
    assert data.steps(feed) == 13
    assert sum(len(x) for x, _ in data.held_out_batches(20, 8, torch.device("cpu"), reserved=50)) == 20


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_held_out_images_judges(tmp_path, in_memory):
    for split, count in (("train", 6), ("test", 4), ("held_out", 70)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (8, 8), (3 * number, 10 if name == "a" else 200, 0))
                image.save(tmp_path / split / name / f"{number:03}.png")
    spec = DataSpec("folder", "f", None, 3, 8, (0.5,) * 3, (0.25,) * 3, in_memory=in_memory, workers=0)
    data = load_data(spec, tmp_path)
    assert (data.train_size, data.test_size, data.fresh_size) == (12, 8, 140)
    settings = PlanSettings.of("svd", max_drop=20.0)
    assert judging.judges_of(settings, TOP1, data, 12, True) == 140
    context = Context(data, Hardware(torch.device("cpu")), 0, Display())
    held_out = judging.held_out_images(torch.nn.Identity(), context, 140)
    inputs = torch.cat([x for x, _ in held_out._read(0, 140)])
    assert len(inputs) == 140
    assert len({tuple(x.flatten().tolist()) for x in inputs}) == 140
    parts = [x for start in (0, 50) for x, _ in held_out._read(start, start + 50 if start == 0 else 140)]
    assert torch.equal(torch.cat(parts), inputs)
    labels = torch.cat([y for _, y in held_out._read(0, 140)])
    assert torch.equal(labels, (inputs[:, 1].mean((1, 2)) > 0).long())
    assert judging.judges_of(PlanSettings.of("svd", max_drop=20.0, images=100), TOP1, data, 12, True) == 140
    with pytest.raises(ConfigError, match=r"at most 105 of the 140 images in held_out/ can judge"):
        judging.judges_of(PlanSettings.of("svd", max_drop=20.0, images=200), TOP1, data, 12, True)


@pytest.mark.parametrize(
    ("goals", "message"),
    [
        (("max_drop=-1",), "max_drop=-1: expected a number above 0"),
        (("latency=8", "runtime=eager"), "latency=8: expected a time with a unit, as in 8ms, 500us or 0.1s"),
        (("speedup=0.5",), "speedup=0.5: expected a number of at least 1"),
        (("latency=8ms", "speedup=2"), "latency=8ms and speedup=2 are two goals; leave one of them out"),
        (("max_drop=1", "rate=0.1"), "rate=0.1 and max_drop=1 cannot be combined"),
        (("max_drop=1", "size=0.1", "latency=8ms"), "are 3 goals; a network is planned for two at most"),
        (("target_error=0.1", "speedup=2"), "target_error=0.1 and speedup=2 cannot be combined"),
        (
            ("speedup=2", "allocation=uniform"),
            "speedup=2 chooses the rate of each layer, so it needs allocation=global",
        ),
        (("contract.confidence=1",), "contract.confidence=1: expected a number of at least 0.5 and below 1"),
        (("max_drop=1",), "max_drop=1 needs 299 held-out inputs"),
        (("max_drop=20", "contract.images=900"), "contract.images=900: at most 150 of the 200 training images"),
    ],
)
def test_wrong_goals_are_one_line(cli, tmp_path, goals, message):
    code, _, err = cli(*TINY, "method=svd", "phase=decompose", *goals)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_drop_needs_data(cli, tmp_path):
    given = ("dataset=none", "dataset.num_classes=10", "model=resnet8", "pretrained=random")
    code, _, err = cli(*given, "max_drop=1", "phase=decompose")
    assert (code, err) == (1, "tspc: max_drop=1 is judged on held-out training images: name a data set\n")


def test_a_metric_that_fails_is_one_line(cli, tmp_path, monkeypatch):
    (tmp_path / "ownjudge.py").write_text("def bad(model, batches):\n    return float('nan')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    code, _, err = cli(*DROP, "phase=decompose", "metric=ownjudge:bad")
    assert code == 1
    assert "metric=ownjudge:bad returned nan" in err


def test_goals_in_words_and_in_order():
    def goal(**options):
        return goal_of(PlanSettings.of("svd", **options).identity)

    goals = [
        *(goal(rate=0.2), goal(rate=0.1), goal(rate=0.1, latency="8ms"), goal(size="2MB"), goal(size=0.1)),
        *(goal(target_error=0.3), "8bits", goal(max_drop=2), goal(max_drop=1), goal(latency="8ms"), goal(speedup=2)),
    ]
    assert goals[2] == "0.1-latency8ms"
    assert [order_of_goal(goal) for goal in goals[3:]] == sorted(map(order_of_goal, goals[3:]))
    assert goal(max_drop=1, latency="8ms") == "drop1-latency8ms"
    assert readable_goal("drop1-latency8ms") == "drop 1, latency 8ms"
    assert readable_goal("0.1-latency8ms") == "0.1, latency 8ms"
    assert readable_goal("size1e-05-speedup2") == "size 1e-05, speedup 2"
    assert [kind_of_goal(each) for each in ("0.1", "0.1-latency8ms", "drop1", "size0.1", "8bits")] == [
        *("", "", "drop", "size", "")
    ]
    assert goal_in({"max_drop": "1", "latency": "8ms"}) == "drop1-latency8ms"


def test_units_of_time_and_goals_that_go_together():
    assert [seconds_of(text) for text in ("8ms", "500us", "0.1s", "8", "-1ms", "0ms", "2h")] == [
        *(0.008, pytest.approx(0.0005), 0.1, None, None, None, None)
    ]
    assert contradiction({"rate": 0.1, "latency": "8ms"}) is None
    assert contradiction({"max_drop": 1, "size": "1MB"}) is None


def test_old_identities_have_no_new_keys():
    plain = PlanSettings.of("svd", 0.1).identity
    assert not {"max_drop", "latency", "speedup", "contract"} & set(plain)
    assert PlanSettings.of("svd", size=0.1).identity["rate"] == 0.2
    assert PlanSettings.of("svd", latency="8ms", threads=2).identity["contract"] == {"batch": 1, "threads": 2}
    assert PlanSettings.of("svd", max_drop=1).identity["contract"] == {"confidence": 0.95, "images": None}


def test_in_python_held_out_batches_judge(reference):
    data = load_data(DataSpec("synthetic", "s", 10, 3, 16, (0.5,), (0.25,), options={"train": 900, "test": 130}))
    held_out = list(data.held_out_batches(800, 100, torch.device("cpu")))
    lines = []
    found = tspc.smallest(reference, "svd", max_drop=20, held_out=held_out, confidence=0.8, say=lines.append)
    assert found.drop.bound(0.2) <= 20
    assert lines
    small = tspc.compress(reference, "svd", max_drop=20, held_out=held_out, confidence=0.8)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in found.network.parameters())
    assert small.training == reference.training
    with pytest.raises(ConfigError, match="max_drop=20 needs held_out="):
        tspc.compress(reference, "svd", max_drop=20)
    with pytest.raises(ConfigError, match="held_out has an effect only with max_drop"):
        tspc.compress(reference, "svd", 0.2, held_out=held_out)
    with pytest.raises(ConfigError, match=r"found by trying networks, not by a plan: call tspc\.compress"):
        tspc.plan(reference, "svd", max_drop=20)
    with pytest.raises(ConfigError, match="metric=cosine has an effect only with max_drop"):
        tspc.compress(reference, "svd", 0.2, metric="cosine")
    for few in (1, 3, 5):
        with pytest.raises(DataError, match=f"{few} are too few: give 100 at least"):
            tspc.smallest(reference, "svd", max_drop=20, held_out=[[x[:few] for x in held_out[0]]])
    one_hot = [(images, torch.eye(10)[labels]) for images, labels in held_out]
    with pytest.raises(DataError, match=r"metric=top1 needs the number of a class .* one-hot targets become numbers"):
        tspc.smallest(reference, "svd", max_drop=20, held_out=one_hot)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"images": 100}, "max_drop=null"),
        ({"confidence": 0.9, "latency": "8ms"}, "max_drop=null"),
        ({"batch": 4, "max_drop": 1}, "latency=null and speedup=null"),
        ({"seconds": 2, "rate": 0.5}, "latency=null and speedup=null"),
    ],
)
def test_terms_without_their_goal_are_refused(options, reason):
    first, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{first}={value} has no effect with {reason}; leave it out"):
        PlanSettings.of("svd", **options)
    assert PlanSettings.of("svd", objective="latency", batch=4).terms.batch == 4
    assert PlanSettings.of("svd", 0.5, threads=None, confidence=0.95).rate == 0.5, "defaults that are passed on"


@pytest.mark.slow
def test_the_frontier_is_a_table_a_file_and_a_picture(cli, tmp_path):
    code, out, err = cli(*TINY, "method=svd", "phase=plan", "report=true", "runtime=onnx", "phase.plan.speedups=[1.01]")
    assert (code, err) == (0, "")
    assert "expected" in out
    assert "Speedups in onnx" in out
    folder = tmp_path / "outputs/synthetic/resnet8/reference"
    found = json.loads((folder / "frontier.json").read_text())
    assert [point["goal"] for point in found["by_size"]] == ["rate=0.4", "rate=0.2", "rate=0.1", "rate=0.05"]
    sizes = [point["bytes"] for point in found["by_size"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(point["seconds"] > 0 for point in found["by_size"])
    assert (folder / "frontier.png").stat().st_size > 5000
    code, out, err = cli(*TINY, "method=svd", "phase=plan", "max_drop=20")
    assert (code, err) == (0, "")
    assert "Rates, as expected" in out
    assert json.loads((folder / "frontier.json").read_text())["by_size"][0]["goal"] == "size=0.4"


def test_a_run_by_rate_has_a_contract_too(cli, tmp_path):
    code, _, err = cli(*TINY, "method=svd", "phase=decompose", "rate=0.3")
    assert (code, err) == (0, "")
    (goal,) = result_in(tmp_path / "outputs/synthetic/resnet8/svd-0.3/seed0")["contract"]["goals"]
    assert goal["goal"] == "rate=0.3"
    assert goal["kept"]
    code, _, err = cli(*TINY, "method=svd", "phase=decompose", "size=0.2")
    assert (code, err) == (0, "")
    (goal,) = result_in(tmp_path / "outputs/synthetic/resnet8/svd-size0.2/seed0")["contract"]["goals"]
    assert (goal["goal"], goal["kept"]) == ("size=0.2", True)
