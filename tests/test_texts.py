"""Data sets of texts, and of a user's function: what they read, how they make batches, and what is wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tspc.data import Feed, ModelInputs, OwnSpec, TextSpec, load_data
from tspc.data.tokenizers import ByteTokenizer
from tspc.errors import ConfigError, DataError
from tspc.system.processes import Share

CPU = torch.device("cpu")
WORDS = "one two three four five six seven".split()


def lines(count: int = 12) -> list[str]:
    return [" ".join(WORDS[: 1 + place % 7]) + f" {place}" for place in range(count)]


def labelled(folder: Path, ending: str = ".tsv", labels: tuple[str, ...] = ("bad", "good")) -> Path:
    for split, count in (("train", 12), ("test", 5)):
        rows = [(text, labels[place % len(labels)]) for place, text in enumerate(lines(count))]
        if ending == ".jsonl":
            written = [json.dumps({"text": text, "label": label}) for text, label in rows]
        else:
            mark = "\t" if ending == ".tsv" else ","
            written = [mark.join(row) for row in [("text", "label"), *rows]]
        (folder / f"{split}{ending}").write_text("\n".join(written) + "\n")
    return folder


def spec(task: str = "text_classification", **changes) -> TextSpec:
    return TextSpec(**{"kind": "text", "name": "t", "task": task, "tokenizer": "bytes", "length": 16} | changes)


def feed(**changes) -> Feed:
    return Feed(**{"batch_size": 4, "seed": 0, "device": CPU} | changes)


def decoded(row: torch.Tensor) -> str:
    return bytes(int(token) - 4 for token in row if token > 3).decode()


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl"])
def test_tables_of_labelled_texts(tmp_path, ending):
    data = load_data(spec(), labelled(tmp_path, ending))
    assert (data.num_classes, data.train_size, data.test_size, data.fresh_size) == (2, 12, 5, 0)
    inputs, targets = next(data.test_batches(3, CPU))
    assert isinstance(inputs, ModelInputs)
    assert list(inputs.named) == ["input_ids", "attention_mask"]
    assert decoded(inputs.named["input_ids"][1]) == "one two 1"
    assert inputs.named["input_ids"].shape == inputs.named["attention_mask"].shape == (3, 16)
    assert inputs.named["attention_mask"].sum(1).tolist() == [2 + len("one 0"), 2 + len("one two 1"), 16]
    assert targets.tolist() == [0, 1, 0], "classes by the order of their names"


def test_classes_of_folders_pairs_and_numbers(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "1.txt").write_text(f"text of {label}")
    data = load_data(spec(), tmp_path)
    assert [targets.tolist() for _, targets in data.test_batches(9, CPU)] == [[0, 1]]
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "test"):
        (other / f"{split}.csv").write_text('text,text_pair,label\n"one, two",x,10\n"say ""no""",yy,2\n')
    data = load_data(spec(num_classes=11), other)
    inputs, targets = next(data.test_batches(2, CPU))
    assert targets.tolist() == [10, 2], "labels that are numbers keep them"
    assert decoded(inputs.named["input_ids"][0]) == "one, twox"
    assert inputs.named["token_type_ids"][0].tolist() == [0] * 10 + [1] * 2 + [0] * (inputs.first.shape[1] - 12)


def test_blocks_predict_every_token_but_the_first_once(tmp_path):
    text = "The quick brown fox jumps over the lazy dog."
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    data = load_data(spec("language_modelling"), tmp_path)
    (inputs, targets), *more = data.test_batches(9, CPU)
    assert more == []
    mask = inputs.named["attention_mask"].bool()
    assert mask.sum(1).tolist() == [15, 14, 14], "blocks of nearly one length"
    assert decoded(inputs.named["input_ids"][mask]) == text[:-1]
    assert decoded(targets[mask]) == text[1:]
    assert set(targets[~mask].tolist()) == {-100}


def test_hidden_tokens_are_the_targets(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    data = load_data(spec("language_modelling", masked=0.2), tmp_path)
    plain = load_data(spec("language_modelling"), tmp_path)
    assert data.fingerprint != plain.fingerprint
    inputs, targets = (
        torch.cat(parts) for parts in zip(*((x.first, y) for x, y in data.test_batches(99, CPU)), strict=True)
    )
    own, _ = next(plain.test_batches(99, CPU))
    counted = targets != -100
    assert 0.15 < float(counted.float().mean()) < 0.25
    assert bool(counted.any(1).all())
    assert torch.equal(targets[counted], own.first[counted])
    assert torch.equal(inputs[~counted], own.first[~counted])
    assert 0.7 < float((inputs[counted] == 3).float().mean()) < 0.9
    twice = [next(data.train_batches(feed(), 2, start=1))[0].first for _ in range(2)]
    assert torch.equal(*twice), "a resumed run hides the same"
    assert not torch.equal(twice[0], next(data.train_batches(feed(), 3, start=1))[0].first)


def test_numbers_and_lines(tmp_path):
    data = load_data(spec("regression"), labelled(tmp_path, labels=("0.5", "-2")))
    assert data.num_classes == 1
    assert next(data.test_batches(2, CPU))[1].tolist() == [0.5, -2.0]
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines(4)) + "\n\n")
    (tmp_path / "train.tsv").unlink()
    (tmp_path / "test.tsv").unlink()
    assert load_data(spec("sentence_embeddings"), tmp_path).test_size == 4


def test_any_batch_can_be_read_without_those_before_it(tmp_path):
    data = load_data(spec(), labelled(tmp_path))
    whole = list(data.train_batches(feed(held_out=2), 1))
    assert len(whole) == data.steps(feed(held_out=2)) == 2
    (later,) = data.train_batches(feed(held_out=2), 1, start=1)
    assert torch.equal(later[0].first, whole[1][0].first)
    parts = [next(data.train_batches(feed(share=Share(place, 2)), 0)) for place in range(2)]
    both = next(data.train_batches(feed(), 0))
    assert [len(part[1]) for part in parts] == [2, 2]
    assert torch.equal(torch.stack([part[1] for part in parts], 1).flatten(), both[1])
    held = [targets for _, targets in data.held_out_batches(2, 8, CPU)]
    assert len(torch.cat(held)) == 2
    assert sum(len(inputs) for inputs in data.calibration_batches(5, 2, CPU)) == 5


def test_the_digest_follows_the_content_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (load_data(spec(), labelled(tmp_path / name)) for name in "ab")
    assert one.fingerprint == two.fingerprint
    text = (tmp_path / "b/test.tsv").read_text()
    (tmp_path / "b/test.tsv").write_text(text.replace("three", "thrice"))
    assert load_data(spec(name="again"), tmp_path / "b").fingerprint != one.fingerprint
    (tmp_path / "b/held_out.tsv").write_text(text)
    third = load_data(spec(name="third"), tmp_path / "b")
    assert third.fresh_size == 5
    assert third.fresh_fingerprint != ""


def test_bytes_of_a_long_pair_are_cut_at_the_longer_text():
    found = ByteTokenizer().encoded(["abcdefgh"], ["xy"], 8)
    assert decoded(torch.tensor(found["input_ids"][0])) == "abcxy"
    assert found["token_type_ids"] == [[0] * 5 + [1] * 3]


WRONG = {
    "text,mark\na,b\n": "has no column label; its columns are text, mark; name one: dataset.label=COLUMN",
    "sentence,label\na,b\n": "has no column text; its columns are sentence, label; name one: dataset.text=COLUMN",
    "": "there is no text in it",
    "text,label\n": "there is no text in it",
    "text,label\na,b,c\n": "row 1 has 3 columns, the first line names 2",
    'text,label\n"a,b\n': "not a table of comma-separated values",
}


@pytest.mark.parametrize("content", WRONG)
def test_wrong_tables(tmp_path, content):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(content)
    with pytest.raises(DataError, match=WRONG[content]):
        load_data(spec(), tmp_path)


def test_wrong_folders_labels_and_tokenizers(tmp_path):
    with pytest.raises(DataError, match="needs data_dir=FOLDER with train.tsv"):
        load_data(spec())
    with pytest.raises(DataError, match="expected train.tsv .*or train/CLASS"):
        load_data(spec(), tmp_path)
    folder = labelled(tmp_path)
    with pytest.raises(DataError, match="the label 'bad' in row 1 is no number; task=regression needs numbers"):
        load_data(spec("regression"), folder)
    with pytest.raises(DataError, match="dataset.num_classes=3, but .* has 2 labels"):
        load_data(spec(num_classes=3), folder)
    with pytest.raises(DataError, match="dataset.tokenizer=nowhere: expected a folder"):
        load_data(spec(tokenizer="nowhere"), folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: there is no tokenizer in it"):
        load_data(spec(tokenizer=str(tmp_path / "empty")), folder)
    (tmp_path / "test.tsv").write_text("text\tlabel\na\tugly\n")
    with pytest.raises(DataError, match="test.tsv: the label ugly is in no training text"):
        load_data(spec(), folder)
    (tmp_path / "test.csv").write_text("text,label\na,bad\n")
    with pytest.raises(DataError, match="test.tsv and test.csv are there; leave one of them"):
        load_data(spec(), folder)
    (tmp_path / "test.csv").unlink()
    (tmp_path / "test.tsv").write_bytes(b"text\tlabel\n\xff\tbad\n")
    with pytest.raises(DataError, match="byte 11 is no UTF-8"):
        load_data(spec(), folder)


OWN = """
import torch

def sounds(count=6, data_dir=None):
    inputs = lambda i: {"x": torch.ones(3 + i % 2, 2), "attention_mask": torch.ones(3 + i % 2)}
    split = [(inputs(i), [1] * (i % 3 + 1)) for i in range(count)]
    return split, split[:2]

def numbers():
    return [([1.0, 2.0], 2), ([3.0, 4.0], 0)], [([1, 2], 1)]

def nothing():
    return 5

def broken():
    raise ValueError("no disk")
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    (tmp_path / "owndata.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "owndata", raising=False)
    return "owndata"


def test_a_function_gives_the_data(module, tmp_path):
    data = load_data(OwnSpec("factory", "o", f"{module}:sounds", options={"count": 5}), tmp_path)
    assert (data.train_size, data.test_size, data.num_classes) == (5, 2, 1)
    inputs, targets = next(data.test_batches(2, CPU))
    assert inputs.named["x"].shape == (2, 4, 2)
    assert inputs.mask.tolist() == [[True, True, True, False], [True] * 4]
    assert targets.tolist() == [[1, -100], [1, 1]]
    data = load_data(OwnSpec("factory", "o", f"{module}:numbers"))
    inputs, targets = next(data.calibration_batches(2, 2, CPU)), None
    assert isinstance(inputs, torch.Tensor)
    assert data.num_classes == 3


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "returned int: it must return \\(train, test\\)"),
        ("broken", "failed: ValueError: no disk"),
        ("missing", "cannot be imported"),
    ],
)
def test_what_is_wrong_with_a_function_is_told(module, name, told):
    with pytest.raises(ConfigError, match=told):
        load_data(OwnSpec("factory", "o", f"{module}:{name}"))


@pytest.mark.slow
def test_the_library_of_data_sets_reads_local_files(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="needs the extra: pip install 'tspc[datasets]'")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    own, plain = tmp_path / "own", tmp_path / "plain"
    own.mkdir()
    plain.mkdir()
    plain = load_data(spec(), labelled(plain))
    labelled(own, ".csv")
    data = load_data(spec(kind="datasets"), own)
    assert data.fingerprint == plain.fingerprint
    with pytest.raises(DataError, match="has no split dev; it has train, test; name them"):
        load_data(spec(kind="datasets", test_split="dev"), own)
