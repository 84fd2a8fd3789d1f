"""Runs of tasks other than the classification of images: the losses, the metrics, and what is wrong with them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.text_tasks import install, write
from tspc.data import ModelInputs
from tspc.errors import ConfigError
from tspc.pages.report import write_report
from tspc.phases.agreement import Apart
from tspc.training import METRICS, Task

QUICK = (
    *("method=svd", "rate=0.4", "report=false", "calibration.samples=24", "dataset.pretrain.learning_rate=1e-2"),
    *("dataset.pretrain.steps=8", "epochs=1", "phase.distill.images=32", "batch_size=16", "dataset.length=24"),
)


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    return install(tmp_path, monkeypatch)


def result(folder: Path, task: str) -> dict:
    (path,) = (folder / "outputs" / task).rglob("result.json")
    return json.loads(path.read_text())


RUNS = {
    "text_classification": ("classifier", "top-1"),
    "regression": ("number", "squared error"),
    "language_modelling": ("words", "perplexity"),
}


@pytest.mark.parametrize("task", RUNS)
def test_a_task_goes_through_all_phases(cli, tmp_path, module, task):
    network, label = RUNS[task]
    command = (f"task={task}", "model=custom", f"model.factory={module}:{network}", "data_dir=texts", *QUICK)
    write(tmp_path / "texts", task)
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert out.count(f"{label} ") >= 3
    assert "inputs ┃" in out
    assert "images" not in out, "there are none"
    found = result(tmp_path, task)
    values = {"top1": 0.6, "squared error": 2.0, "perplexity": 100.0}
    for phase in ("decompose", "distill", "finetune"):
        record = found["phases"][phase]["accuracy"]
        value = record.get("top1", record.get("value"))
        assert value > values["top1"] if task == "text_classification" else 0 < value < values[label], phase
    run = next((tmp_path / "outputs" / task).rglob("seed0/run.json"))
    assert json.loads(run.read_text())["dataset"]["task"]["name"] == task
    if task == "regression":
        page = write_report(run.parent).read_text()
        assert re.search("for [0-9]+ inputs", page)
        assert not re.findall("(?:[0-9]|test|calibration) images", page)
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert out.count("done before: ") == 3


def test_vectors_are_taught_by_the_reference_alone(cli, tmp_path, module):
    write(tmp_path / "texts", "sentence_embeddings")
    command = ("task=sentence_embeddings", "model=custom", f"model.factory={module}:vector", "pretrained=default")
    command = (*command, "dataset.tokenizer=bytes", "data_dir=texts", "phase=[decompose,distill,finetune]")
    quick = [option for option in QUICK if "pretrain" not in option and "samples" not in option]
    quick += ["calibration.samples=0", "phase.finetune.careful_below=0"]
    code, _, err = cli(*command, *quick)
    assert (code, err) == (0, "")
    found = result(tmp_path, "sentence_embeddings")
    assert found["reference"]["accuracy"]["value"] == pytest.approx(1.0)
    values = [found["phases"][name]["accuracy"]["value"] for name in ("decompose", "finetune")]
    assert 0.3 < values[0] < values[1] < 1
    code, _, err = cli(*command, *quick, "phase.finetune.distillation=0.5")
    assert code == 1
    assert "phase.finetune.distillation=0.5 has no effect with task=sentence_embeddings" in err


def test_a_task_of_ones_own(cli, tmp_path, module):
    command = ("task=custom", "model=custom", f"model.factory={module}:Sums", f"dataset.factory={module}:data")
    command = (*command, f"metric={module}:closeness", f"task.loss={module}:loss", "rate=0.7")
    quick = [option for option in QUICK if "length" not in option and "rate=0.4" not in option]
    code, out, err = cli(*command, *quick)
    assert (code, err) == (0, "")
    assert "closeness" in out
    found = result(tmp_path, "custom")
    assert found["accuracy"]["metric"] == f"{module}:closeness"
    assert -20 < found["accuracy"]["value"] < 0


MISTAKES = {
    "task=text_clasification": "task=text_clasification does not exist; choose one of custom, image_classification",
    "task=text_classification dataset=cifar10": "takes no dataset of the kind cifar10: choose one of text, datasets",
    "task=text_classification": "dataset=text_classification needs data_dir=FOLDER with train.tsv",
    "task=text_classification data_dir=empty": "train.tsv: there is no text in it",
    "task=text_classification data_dir=texts dataset.label=mark": "has no column mark; its columns are text, label",
    "task=text_classification data_dir=texts dataset.text=words": "name one: dataset.text=COLUMN",
    "task=text_classification data_dir=texts dataset.tokenizer=nowhere": "dataset.tokenizer=nowhere: expected a folder",
    "task=regression data_dir=texts": "the label 'bad' in row 1 is no number; task=regression needs numbers",
    "task=sentence_embeddings data_dir=texts": "has no targets with which a reference could be trained",
    "task=custom": "task=custom has no usual metric: give metric=package.module:function",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_get_one_line_and_change_nothing(cli, tmp_path, module, arguments):
    write(tmp_path / "texts", "text_classification")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train.tsv").write_text("text\tlabel\n")
    network = [] if "task=custom" in arguments else ["model=custom", f"model.factory={module}:classifier"]
    code, _, err = cli(*arguments.split(), *network)
    assert code == 1
    assert MISTAKES[arguments] in err
    assert err.startswith("tspc: ")
    assert err.count("\n") == 1
    assert not os.path.exists(tmp_path / "outputs")


@pytest.mark.parametrize(
    ("network", "task", "told"),
    [
        ("words", "text_classification", "values for an input; the data has 2 classes; name another kind of answer"),
        ("classifier", "language_modelling", "task.answers=tokens needs (N, L, C) and whole numbers (N, L)"),
        ("few_words", "language_modelling", "task.answers=tokens needs a score for each of 260 tokens"),
        ("classifier", "regression", "task.answers=values needs as many of both"),
        ("Sums", "regression", "Sums cannot take the data set's inputs, ModelInputs(input_ids="),
    ],
)
def test_a_network_that_does_not_suit_the_task(cli, tmp_path, module, network, task, told):
    write(tmp_path / "texts", task)
    code, _, err = cli(f"task={task}", "model=custom", f"model.factory={module}:{network}", "data_dir=texts")
    assert (code, err.count("\n")) == (1, 1)
    assert told in err
    assert not os.path.exists(tmp_path / "outputs")


def test_only_positions_with_a_target_count():
    torch.manual_seed(0)
    answer, wanted, targets = torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.randint(9, (2, 4))
    targets[1, 2:] = -100
    counted = targets != -100
    changed = torch.where(counted[..., None], answer, torch.randn(2, 4, 9))
    task = Task("language_modelling", "tokens")
    rows = F.cross_entropy(answer[counted], targets[counted], reduction="none")
    expected = (rows[:4].mean() + rows[4:].mean()) / 2
    assert torch.allclose(task.loss_of(answer, targets), expected)
    for first, second in ((answer, answer), (answer, changed)):
        assert torch.allclose(task.loss_of(first, targets), task.loss_of(second, targets))
        taught = [task.taught_by(each, wanted, targets, 2.0) for each in (first, second)]
        assert torch.allclose(*taught)
    assert float(task.taught_by(wanted, wanted, targets, 2.0)) == pytest.approx(0, abs=1e-6)
    for name in ("perplexity", "agreement", "cosine", "mse"):
        each = task.judged_by(METRICS[name]).each
        assert torch.allclose(each(answer, targets, wanted), each(changed, targets, wanted)), name
    perplexity = task.judged_by(METRICS["perplexity"]).each(answer, targets, None)
    assert torch.allclose(perplexity.mean(), expected)
    counts = [Apart.of(task).counts(each, wanted, targets) for each in (answer, changed)]
    assert torch.equal(*counts)
    batch = ModelInputs(named={"input_ids": targets.clamp(min=0), "attention_mask": counted.long()})
    assert torch.equal(task.stand_ins(batch) != -100, counted)


def test_two_folders_of_texts_take_two_names(cli, tmp_path, module):
    for place, name in enumerate(("one", "two")):
        write(tmp_path / name, "text_classification", train=8 + place, test=4)
    command = ("task=text_classification", "model=custom", f"model.factory={module}:classifier", "batch_size=4")
    command = (*command, "dataset.pretrain.steps=1", "report=false", "phase=pretrain")
    assert cli(*command, "data_dir=one")[0] == 0
    code, _, err = cli(*command, "data_dir=two")
    assert code == 1
    assert "classifier/reference holds another run (data: " in err
    assert "pass dataset.name=NAME if data_dir=two is other data, or another output_dir to keep both" in err
    assert cli(*command, "data_dir=two", "dataset.name=second")[0] == 0


def test_metrics_that_do_not_suit_the_answers():
    for name, answers, metric in (("language_modelling", "tokens", "top1"), ("regression", "values", "perplexity")):
        with pytest.raises(
            ConfigError, match=f"metric={metric} does not suit task={name}, which answers with {answers}"
        ):
            Task(name, answers).judged_by(METRICS[metric])
    assert Task("custom", "values").judged_by(METRICS["top1"]) == METRICS["top1"], "what it answers is the user's"


def test_vectors_and_numbers():
    torch.manual_seed(0)
    wanted = torch.randn(64, 3)
    vectors, numbers = Task("sentence_embeddings", "embeddings"), Task("regression", "values")
    assert not vectors.has_labels
    assert float(vectors.taught_by(wanted, wanted, wanted, 1.0)) == pytest.approx(0, abs=1e-6)
    assert float(vectors.taught_by(-wanted, wanted, wanted, 1.0)) > 5
    assert float(numbers.loss_of(wanted[:, :1], wanted[:, 0])) == pytest.approx(0)
    apart = Apart.of(vectors)
    near = wanted + 0.1 * torch.randn(64, 3)
    assert apart.distance([apart.counts(near, wanted, wanted)] * 2) == pytest.approx(0.01, rel=0.5)
    assert apart.distance([apart.counts(wanted.mean() + 0 * wanted, wanted, wanted)]) == pytest.approx(1, rel=1e-6)
    with pytest.raises(ConfigError, match="needs a vector for each input"):
        vectors.check_answer(torch.zeros(2, 3, 4), torch.zeros(2), 1, "net")


def test_a_loss_of_ones_own_is_checked(module):
    task = Task("custom", "values", f"{module}:loss")
    assert float(task.loss_of(torch.ones(2, 1), torch.zeros(2))) == 1
    with pytest.raises(ConfigError, match="task.loss='owntasks:loss' failed: IndexError"):
        task.loss_of(torch.ones(2), torch.zeros(2))
    with pytest.raises(ConfigError, match="returned .*; expected one number, as a tensor"):
        Task("custom", "values", f"{module}:filled").loss_of(torch.tensor(3), torch.tensor(0))
