"""Published networks of transformers: what they say of their classes, and weights and tokenizers that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.text_tasks import write
from tests.tiny_transformers import SMALL
from tspc.data import TextSpec
from tspc.data.tokenizers import PublishedTokenizer
from tspc.errors import ConfigError, DataError, WeightsError
from tspc.models import NetworkSpec, class_names
from tspc.run.reference import network_spec

transformers = pytest.importorskip("transformers")


def saved(folder: Path, kind: str, **fields: object) -> str:
    """The folder of a tiny network, without a tokenizer."""
    config = transformers.BertConfig(**SMALL, vocab_size=260, **fields)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return str(folder)


def named_classifier(folder: Path) -> str:
    return saved(
        folder, "BertForSequenceClassification", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}
    )


def build(folder: str, task: str, classes: int | None = None) -> object:
    return NetworkSpec("transformers", folder, classes, task=task).build(pretrained=True)


def test_labels_stand_for_the_answers_that_the_network_names(cli, tmp_path):
    folder = named_classifier(tmp_path / "net")
    assert class_names(folder, {}) == ("good", "bad")
    assert class_names(saved(tmp_path / "plain", "BertModel"), {}) is None
    texts = write(tmp_path / "texts", "text_classification", train=16, test=8)
    command = ("task=text_classification", "model=transformers", f"model.name={folder}", "pretrained=default")
    command = (*command, "dataset.tokenizer=bytes", "method=svd", "rate=0.4", "report=false", "calibration.samples=0")
    code, _, err = cli(*command, "phase=decompose", f"data_dir={texts}")
    assert code == 0, err
    (record,) = tmp_path.glob("outputs/*/*/svd-0.4/seed0/run.json")
    assert json.loads(record.read_text())["dataset"]["classes"] == ["good", "bad"]
    other = write(tmp_path / "other", "text_classification", train=16, test=8)
    for path in other.iterdir():
        path.write_text(path.read_text().replace("\tgood", "\tfine"))
    code, _, err = cli(*command, "phase=plan", f"data_dir={other}")
    assert code == 1
    assert "the label fine is none of the classes that the network answers with, which are good, bad" in err


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    bare = saved(tmp_path / "bare", "BertModel")
    with pytest.raises(DataError, match="bare: there is no tokenizer in it"):
        PublishedTokenizer(bare)
    folder = Path(bare)
    (folder / "config.json").write_text('{"model_type": "t5"}')  # its empty tokenizer has a hundred marks and a space
    with pytest.raises(DataError, match="bare: there is no tokenizer in it"):
        PublishedTokenizer(bare)
    (folder / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(DataError, match="bare: there is no tokenizer in it"):
        PublishedTokenizer(bare)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="knows no words"):
        PublishedTokenizer(bare)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    assert PublishedTokenizer(bare).encoded(["good bad"], None, 9) == {
        "input_ids": [[2, 5, 6, 3]],
        "token_type_ids": [[0] * 4],
    }
    with pytest.raises(DataError, match=r"dataset.tokenizer=./nowhere/at/all: there is no such folder"):
        PublishedTokenizer("./nowhere/at/all")


def test_a_new_network_has_the_tokens_of_the_tokenizer():
    def spec(name: str, **kwargs: object) -> NetworkSpec:
        network = NetworkSpec("transformers", name, kwargs=kwargs, task="language_modelling")
        data = TextSpec("text", "t", "language_modelling", tokenizer="bytes")
        config: Any = SimpleNamespace(dataset=data, network=network, pretrained=None)
        return network_spec(config, None)

    assert spec("bert").kwargs == {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    assert spec("gpt2", vocab_size=300, bos_token_id=7).kwargs["vocab_size"] == 300
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    network = spec("gpt2", **sizes).build().network.config
    assert (network.vocab_size, network.bos_token_id, network.eos_token_id) == (260, 1, 2)
    assert spec("vit").kwargs == {}, "a type without tokens"


def test_folders_that_hold_no_network(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    for name, told in (
        (str(tmp_path), "its config.json cannot be used .*nosuch"),
        ("./none", "there is no such folder"),
    ):
        with pytest.raises(ConfigError, match=told):
            class_names(name, {})


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path, capfd):
    encoder = saved(tmp_path / "encoder", "BertModel")
    with pytest.raises(WeightsError, match="has no weights for classifier.bias, classifier.weight, so its answers for"):
        build(encoder, "text_classification", 2)
    masked = saved(tmp_path / "masked", "BertForMaskedLM")
    build(masked, "sentence_embeddings")  # the pooler is missing, and does not count
    build(masked, "custom")
    classifier = named_classifier(tmp_path / "classifier")
    with pytest.raises(WeightsError, match="gives 2 values for an input, task=regression needs 1"):
        build(classifier, "regression")
    with pytest.raises(WeightsError, match="gives 2 values for an input, task=text_classification needs 3"):
        build(classifier, "text_classification", 3)
    with pytest.raises(WeightsError, match="has no weights for cls.predictions"):
        build(classifier, "language_modelling")
    spec = NetworkSpec("transformers", classifier, 2, kwargs={"vocab_size": 99}, task="text_classification")
    with pytest.raises(WeightsError, match=r"word_embeddings.weight has the shape \(260, 32\) in .* and \(99, 32\)"):
        spec.build(pretrained=True)
    assert "MISSING" not in capfd.readouterr().err
