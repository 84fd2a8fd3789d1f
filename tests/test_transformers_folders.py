"""Networks of transformers in folders: saved with configuration and tokenizer, loaded in one line, trained, run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tspc
from tests.nets import Net
from tests.tiny_transformers import KINDS, batch_of, tiny
from tspc.data.answers import answer_of
from tspc.errors import ConfigError, RunError, TspcError, TspcWarning, WeightsError
from tspc.layers.forms import tensorized_layers
from tspc.models import NetworkSpec
from tspc.models.transformers_tasks import SentenceEmbeddings, pooling_of, wrapped

transformers = pytest.importorskip("transformers")


def compressed(model: nn.Module, **options: object) -> nn.Module:
    return tspc.compress(model, "svd", 0.5, allocation="uniform", **options).eval()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return compressed(tiny("bert"))


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "bert")]
)
@torch.no_grad()
def test_a_folder_gives_the_network_back(tmp_path, name):
    small, batch = compressed(tiny(name)), batch_of(name)
    tspc.save(small, f"{tmp_path / 'small'}/")
    again = tspc.load(tmp_path / "small")
    assert type(again) is type(small)
    assert not again.training
    assert tensorized_layers(again).keys() == tensorized_layers(small).keys()
    ours, theirs = answer_of(again(**batch)), answer_of(small(**batch))
    assert torch.equal(ours, theirs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"load this folder with tspc.load\(FOLDER\), not with from_pretrained"):
        type(small).from_pretrained(tmp_path / "small")
    if not again.can_generate():  # type: ignore[operator]
        return
    assert again.generation_config == small.generation_config
    given = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
    wanted = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    told = [again.generate(**given, **wanted, use_cache=cached) for cached in (True, False)]  # type: ignore[operator]
    assert torch.equal(*told)


def test_a_tokenizer_is_carried_along_and_code_is_not(tmp_path, bert):
    (tmp_path / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "words.txt"))
    tokenizer.save_pretrained(tmp_path / "before")
    (tmp_path / "before" / "modeling_own.py").write_text("raise SystemExit")
    (tmp_path / "before" / "vocab.py").write_text("raise SystemExit")
    (tmp_path / "before" / "1_Pooling").mkdir()
    (tmp_path / "before" / "1_Pooling" / "config.json").write_text("{}")
    for given, more in ((tokenizer, set()), (tmp_path / "before", {"1_Pooling/config.json"})):
        tspc.save(bert, tmp_path / "small", beside=given)
        found = files(tmp_path / "small")
        assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} | more <= found
        assert not [name for name in found if name.endswith(".py")]
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
        assert again("good bad")["input_ids"] == tokenizer("good bad")["input_ids"]
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt", "before", "small"}, "nothing is left over"
    with pytest.raises(WeightsError, match="beside='nowhere' is no folder"):
        tspc.save(bert, tmp_path / "other", beside="nowhere")
    assert not (tmp_path / "other").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, bert):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.jpg").write_text("a photo")
    with pytest.raises(RunError, match=r"photos holds one\.jpg; choose an empty or a new folder"):
        tspc.save(bert, folder)
    (folder / "one.jpg").rename(folder / "model.safetensors")
    with pytest.raises(TspcError, match=r"model\.safetensors"):
        tspc.save(bert, folder)
    tiny("bert").save_pretrained(folder)  # type: ignore[operator]
    with pytest.raises(RunError, match="model.safetensors, which tspc did not write"):
        tspc.save(bert, folder)
    with pytest.raises(WeightsError, match=r"Net is no network of transformers.*small\.safetensors"):
        tspc.save(Net(), f"{tmp_path / 'net'}/")
    with pytest.raises(WeightsError, match="holds no model.safetensors"):
        tspc.load(tmp_path)
    tspc.save(bert, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").is_file(), "a path with an ending is a file"


def test_an_older_folder_survives_a_failure(tmp_path, bert, monkeypatch):
    tspc.save(bert, tmp_path / "small")
    before = {name: (tmp_path / "small" / name).read_bytes() for name in files(tmp_path / "small")}
    monkeypatch.setattr("tspc.compression.folders.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(RunError, match="cannot write"):
        tspc.save(bert, tmp_path / "small")
    assert {name: (tmp_path / "small" / name).read_bytes() for name in files(tmp_path / "small")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["os"]}, "names the architecture .*os.*, which transformers lacks"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is no network of type bert"),
        ({"backbone": "somebody/network"}, "it sets backbone to somebody/network, which is not taken from a folder"),
        ({"hidden_size": 10**6}, "larger than the file's weights|cannot be built"),
        ({"tspc": {"kind": "Thread"}}, "is no way to use a network"),
    ],
)
def test_a_configuration_from_anybody_is_not_trusted(tmp_path, bert, change, message):
    tspc.save(bert, tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TspcError, match=message):
        tspc.load(tmp_path / "small")


def test_fields_that_would_choose_code_do_not_reach_the_network(tmp_path, bert):
    tspc.save(bert, tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    code = {"auto_map": {"AutoModel": "own.Own"}, "_attn_implementation": "somebody/kernel", "_name_or_path": "x"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    config = tspc.load(tmp_path / "small").config
    assert config._attn_implementation in ("sdpa", "eager")  # type: ignore[union-attr]
    assert not hasattr(config, "auto_map")


@torch.no_grad()
def test_sentence_embeddings_leave_padding_out_and_come_back_from_a_folder(tmp_path):
    network, batch = tiny("bert").bert, batch_of("bert")
    padded = batch["input_ids"].clone()
    padded[-1, 5:] = 0
    for pooling, normalise in (("mean", True), ("max", False), ("cls", True)):
        model = SentenceEmbeddings(network, pooling, normalise).eval()  # type: ignore[arg-type]
        wanted = model(**batch)
        torch.testing.assert_close(model(**batch | {"input_ids": padded}), wanted)
        torch.testing.assert_close(model(batch["input_ids"][-1:, :5])[0], wanted[-1], rtol=1e-4, atol=1e-5)
        assert torch.allclose(wanted.norm(dim=1), torch.ones(2)) == normalise
    small = compressed(model)
    tspc.save(small, tmp_path / "small")
    again = tspc.load(tmp_path / "small")
    assert (type(again), again.pooling) == (SentenceEmbeddings, "cls")
    assert torch.equal(again(**batch), small(**batch))


def test_pooling_of_sentence_transformers(tmp_path):
    assert pooling_of(tmp_path) == {}
    parts = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    listed = [{"path": path, "type": kind} for path, kind in parts]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling").mkdir()
    told = tmp_path / "1_Pooling" / "config.json"
    told.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert pooling_of(tmp_path) == {"normalise": False, "pooling": "cls"}
    told.write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(ConfigError, match="pools tokens by pooling_mode_lasttoken; tspc knows"):
        pooling_of(tmp_path)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("task", "name", "fields", "shape"),
    [
        ("text_classification", "bert", SMALL, (2, 5)),
        ("regression", "bert", SMALL, (2, 1)),
        ("sentence_embeddings", "bert", SMALL, (2, 32)),
        ("language_modelling", "bert", SMALL, (2, 7, 50)),
        ("language_modelling", "gpt2", GPT2, (2, 7, 50)),
        ("custom", "bert", SMALL, (2, 7, 32)),
        ("speech", "whisper", KINDS["whisper"][2], (2, 7, 60)),
    ],
)
def test_a_network_for_each_task(task, name, fields, shape):
    model = NetworkSpec("transformers", name, 5, kwargs=fields, task=task).build().eval()
    with torch.no_grad():
        assert model(**batch_of(name)).shape == shape
    kind = {"bert": "ForMaskedLM", "gpt2": "LMHeadModel"}[name] if task == "language_modelling" else ""
    assert type(model.network).__name__.endswith(kind)  # type: ignore[arg-type]
    assert type(wrapped(model.network, model.describe())) is type(model)  # type: ignore[operator, arg-type]


def test_a_network_of_a_task_writes_texts():
    model = NetworkSpec("transformers", "gpt2", 5, kwargs=GPT2, task="language_modelling").build().eval()
    batch = torch.ones(2, 3, dtype=torch.long)
    found = model.generate(batch, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert torch.equal(found, model.network.generate(batch, max_new_tokens=2, do_sample=False))  # type: ignore[union-attr, operator]


def test_a_task_that_is_none():
    with pytest.raises(ConfigError, match="task='poetry': choose one of image_classification, "):
        NetworkSpec("transformers", "bert", 5, task="poetry").build()
    assert "task" not in NetworkSpec("transformers", "bert", 5).to_dict()


@pytest.mark.slow
def test_the_trainer_saves_resumes_and_refuses_integers(tmp_path, bert):
    row = {key: value[0] for key, value in batch_of("bert").items()}
    data = [row | {"labels": torch.tensor(i % 2)} for i in range(16)]

    def trained(network: nn.Module, folder: Path, resumed: str | None = None) -> nn.Module:
        settings = transformers.TrainingArguments(
            str(folder), max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        transformers.Trainer(network, settings, train_dataset=data).train(resume_from_checkpoint=resumed)
        return network.eval()

    batch = batch_of("bert")
    whole = trained(copy.deepcopy(bert), tmp_path / "a")
    assert (tmp_path / "a" / "checkpoint-2" / "optimizer.pt").exists()
    again = tspc.load(tmp_path / "a" / "checkpoint-4")
    assert torch.equal(again(**batch).logits, whole(**batch).logits)
    assert not torch.equal(again(**batch).logits, bert(**batch).logits)
    later = trained(copy.deepcopy(bert), tmp_path / "a", str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(later(**batch).logits, whole(**batch).logits)
    narrow = compressed(tiny("bert"), bits=8)
    with pytest.warns(TspcWarning, match="training goes on from there with tspc.load"):
        trained(narrow, tmp_path / "b")
    assert torch.equal(tspc.load(tmp_path / "b" / "checkpoint-4")(**batch).logits, narrow(**batch).logits)
    with pytest.raises(RuntimeError, match=r"the file holds integers; read the network with tspc\.load"):
        trained(narrow, tmp_path / "b", str(tmp_path / "b" / "checkpoint-2"))


def test_accelerate_prepares_and_saves(tmp_path, bert):
    accelerate = pytest.importorskip("accelerate")
    helper = accelerate.Accelerator(cpu=True)
    model = copy.deepcopy(bert).train()
    model, optimizer = helper.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    helper.backward(model(**batch_of("bert"), labels=torch.tensor([0, 1])).loss)
    optimizer.step()
    helper.unwrap_model(model).save_pretrained(tmp_path / "small", state_dict=helper.get_state_dict(model))
    again = tspc.load(tmp_path / "small")
    assert torch.equal(again(**batch_of("bert")).logits, model.eval()(**batch_of("bert")).logits)
    with pytest.raises(TspcError, match="the state given is not that of the whole compressed network"):
        model.save_pretrained(tmp_path / "other", state_dict={})
    with pytest.raises(TspcError, match="huggingface_hub.upload_folder"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)
