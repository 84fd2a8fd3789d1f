"""Tiny networks of transformers through all phases of their tasks; after a kill they end with the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import tspc
from tests.killing import survives
from tests.text_tasks import write
from tspc.store.scores import value_in

BERT = (
    *("model=transformers", "model.name=bert", "+model.kwargs.hidden_size=32", "+model.kwargs.num_hidden_layers=2"),
    *("+model.kwargs.num_attention_heads=2", "+model.kwargs.intermediate_size=64", "+model.kwargs.vocab_size=260"),
)
GPT2 = (
    *("model=transformers", "model.name=gpt2", "+model.kwargs.n_embd=32", "+model.kwargs.n_layer=2"),
    *("+model.kwargs.n_head=2", "+model.kwargs.n_positions=64", "+model.kwargs.vocab_size=260"),
)
QUICK = (
    *("method=svd", "rate=0.4", "report=false", "calibration.samples=24", "dataset.pretrain.steps=12", "epochs=1"),
    *("dataset.pretrain.learning_rate=3e-3", "phase.distill.images=32", "batch_size=16", "dataset.length=24"),
    *("phase=[pretrain,decompose,distill,finetune,export]", "phase.export.formats=[onnx]"),
)
NETWORKS = {"text_classification": BERT, "language_modelling": GPT2}


@pytest.mark.slow
def test_a_network_goes_through_all_phases(cli, tmp_path):
    task = "language_modelling"
    write(tmp_path / "texts", task)
    command = (f"task={task}", *NETWORKS[task], "data_dir=texts", *QUICK)
    code, _, err = cli(*command)
    assert code == 0, err
    (run,) = (tmp_path / "outputs" / task).glob("*/svd-0.4/seed0")
    result = json.loads((run / "result.json").read_text())
    assert list(result["phases"]) == ["decompose", "distill", "finetune"]
    assert result["rate_reached"] <= 0.4
    (file,) = result["export"]["files"]
    assert value_in(file["accuracy"]) == pytest.approx(value_in(result["accuracy"]), rel=1e-3), "in its runtime"
    small = tspc.load(run / "model.safetensors")
    assert sum(p.numel() for p in small.parameters()) == result["parameters"]["after"]
    code, out, err = cli(*command)
    assert code == 0, err
    assert out.count("done before: ") == 3


def save_encoder(folder: Path, words: list[str]) -> None:
    """A tiny encoder with a tokenizer of its own, as `save_pretrained` writes them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted(set(words))]
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=len(names))).save_pretrained(folder)


@pytest.mark.slow
def test_a_folder_with_a_network_and_its_tokenizer(cli, tmp_path):
    texts = write(tmp_path / "texts", "sentence_embeddings")
    words = (texts / "train.txt").read_text().split()
    save_encoder(tmp_path / "encoder", words)
    quick = [option for option in QUICK if "pretrain" not in option]
    command = ("task=sentence_embeddings", "model=transformers", f"model.name={tmp_path}/encoder", "data_dir=texts")
    quick = [option for option in quick if "export" not in option]
    code, _, err = cli(*command, "pretrained=default", *quick, "phase=[decompose,distill,finetune]")
    assert code == 0, err
    run = tmp_path / "outputs/sentence_embeddings/encoder/svd-0.4/seed0"
    result = json.loads((run / "result.json").read_text())
    values = [result["phases"][name]["accuracy"]["value"] for name in ("decompose", "distill", "finetune")]
    assert all(0.7 < value < 1 for value in values)
    assert values[2] > values[0] - 1e-4
    identity = json.loads((run / "run.json").read_text())["dataset"]
    assert identity["tokenizer"] == f"{tmp_path}/encoder"
    code, _, err = cli(*command, "pretrained=default", *quick, "dataset.tokenizer=bytes", "phase=[decompose,distill]")
    assert code == 1
    assert f"the network knows {len(set(words)) + 4} tokens: name its own tokenizer" in err


@pytest.mark.slow
def test_an_encoder_predicts_hidden_tokens_alone(cli, tmp_path):
    write(tmp_path / "texts", "language_modelling")
    command = ("task=language_modelling", *BERT, "data_dir=texts", *QUICK)
    code, _, err = cli(*[option for option in command if "export" not in option], "phase=[pretrain,distill]")
    assert code == 1
    assert "bert sees the tokens that it should predict" in err
    quick = [
        option for option in command if not option.startswith(("rate", "method", "phase", "epochs", "calibration"))
    ]
    code, out, err = cli(*quick, "dataset.masked=0.2", "phase=pretrain")
    assert code == 0, err
    assert "perplexity" in out


@pytest.mark.slow
@pytest.mark.parametrize("task", NETWORKS)
def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path, task, forks):
    texts = write(tmp_path / "texts", task)
    quick = [option for option in QUICK if "export" not in option]
    quick += ["phase=[pretrain,decompose,distill,finetune]", "checkpoint_seconds=0", "device=cpu"]
    command = (f"task={task}", *NETWORKS[task], f"data_dir={texts}", *quick)
    network = NETWORKS[task][1].partition("=")[2]
    run = Path("outputs") / task / network / "svd-0.4/seed0"
    forks.load(f"transformers.models.{network}.modeling_{network}")
    survives(tmp_path, command, run, int(os.environ.get("TSPC_TEST_KILLED", "1")), forks)


def test_a_network_with_few_positions_names_the_length_that_it_takes(cli, tmp_path):
    write(tmp_path / "texts", "language_modelling")
    command = ("task=language_modelling", *NETWORKS["language_modelling"], "data_dir=texts", *QUICK)
    code, _, err = cli(*command, "dataset.length=65")
    assert code == 1
    assert "it takes 64 tokens at most: set dataset.length=64" in err
    assert "Traceback" not in err
