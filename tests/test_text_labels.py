"""Labels of texts: which class each stands for, and what is no label."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tspc.data import TextSpec, load_data
from tspc.data.text_files import Texts
from tspc.data.texts import encoded
from tspc.errors import DataError
from tspc.run.published import guessed_order

CPU = torch.device("cpu")


def spec(**changes: Any) -> TextSpec:
    usual = {"kind": "text", "name": "t", "task": "text_classification", "tokenizer": "bytes", "length": 16}
    return TextSpec(**usual | changes)


def written(folder: Path, train: list[str], test: list[str] | None = None, text: str = "words") -> Path:
    for split, labels in (("train", train), ("test", test or train)):
        rows = [f"{text}\t{label}" for label in labels]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return folder


def numbers(description: TextSpec, folder: Path) -> list[int]:
    return next(load_data(description, folder).test_batches(99, CPU))[1].tolist()


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (("pos", "neg"), ["neg", "pos", "neg"], [1, 0, 1]),
        (("POSITIVE", "NEGATIVE"), ["negative", "positive"], [1, 0]),
        (("B", "b"), ["b", "B"], [1, 0]),
        (("pos", "neg"), ["1", "0"], [1, 0]),
        (("no", "maybe", "yes"), ["yes", "no"], [2, 0]),
        (None, ["01", "00", "02"], [1, 0, 2]),
        (None, ["2", "0"], [2, 0]),
        (None, ["9" * 5000, "1"], [1, 0]),
    ],
)
def test_the_class_of_a_label(tmp_path, classes, labels, expected):
    assert numbers(spec(classes=classes), written(tmp_path, labels)) == expected


@pytest.mark.parametrize(
    ("changes", "labels", "told"),
    [
        ({"classes": ("pos", "neg")}, ["good", "neg"], "the label good is none of the classes .* which are pos, neg; "),
        ({"classes": ("a", "b"), "num_classes": 3}, ["a", "b"], "dataset.num_classes=3, but the classes are 2: a, b"),
        ({}, ["pos", ""], "row 2 has no label; fill it in, or remove the row"),
        ({}, ["pos", "pos"], "every text has the label pos; two classes are needed"),
        ({}, ["0", "0"], "every text has the label 0; two classes are needed"),
    ],
)
def test_what_is_no_label(tmp_path, changes, labels, told):
    with pytest.raises(DataError, match=told):
        load_data(spec(**changes), written(tmp_path, labels))


def test_empty_texts_are_refused_where_they_have_labels(tmp_path):
    with pytest.raises(DataError, match="row 1 has no text"):
        load_data(spec(), written(tmp_path, ["a", "b"], text=" "))
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").unlink()
        (tmp_path / f"{split}.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert load_data(spec(task="sentence_embeddings"), tmp_path).test_size == 2
    (tmp_path / "train.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="train.jsonl: there is no text in it"):
        load_data(spec(task="sentence_embeddings", name="blank"), tmp_path)
    with pytest.raises(DataError, match="hub train: there is no text in it"):
        encoded(spec(), {"train": Texts("hub train", [], labels=[]), "test": Texts("hub test", [], labels=[])})
    (tmp_path / "train.jsonl").write_text('{"text": ["one"]}\n')
    with pytest.raises(DataError, match="row 1 has list as its text"):
        load_data(spec(task="sentence_embeddings", name="again"), tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").unlink()
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "1.txt").write_text("\n" if label == "b" else "text")
    with pytest.raises(DataError, match=r"b/1.txt: there is no text in it"):
        load_data(spec(), tmp_path)


def test_a_guess_of_the_order_is_told(tmp_path):
    network = SimpleNamespace(family="transformers", name="folder")
    config: Any = SimpleNamespace(network=network, pretrained="default", dataset=spec())
    told = guessed_order(config, load_data(spec(), written(tmp_path, ["neg", "pos"])))
    assert told is not None
    assert "its answers are taken as 0=neg, 1=pos" in told
    assert guessed_order(config, load_data(spec(name="numbers"), written(tmp_path, ["0", "1"]))) is None
    assert spec(task="regression", classes=("a", "b")).problems("dataset")
    assert spec(classes=("a", "a")).problems("dataset")
    assert not spec(classes=("a", "b")).problems("dataset")
