"""The pages that show how to …: their code runs, on tiny networks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(page: str, names: dict[str, object], **others: str) -> dict[str, object]:
    """Runs the code of a page, in which the line of capital names gets other values, and so do arguments."""
    (code,) = blocks(page)
    for name, value in others.items():
        code, count = re.subn(rf"\b{name}=\d+", f"{name}={value}", code)
        assert count > 0
    code, count = re.subn(r"^([A-Z, ]+) = .*$", r"\1 = given[:]", code, count=1, flags=re.MULTILINE)
    assert count == 1
    space: dict[str, object] = dict(names)
    exec(compile(code, page, "exec"), space)
    return space


@pytest.mark.parametrize("page", ["sentence_encoder.md", "speech_recogniser.md", "own_task.md"])
def test_they_are_short(page):
    assert sum(len(code.splitlines()) for code in blocks(page)) <= 60


def tokenizer_in(folder: Path, texts: list[str]) -> int:
    """Writes a tokenizer of whole words, with a token before each text; returns how many it knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for text in texts for word in text.split()})]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 1)])
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return len(words)


@pytest.mark.slow
def test_a_sentence_encoder(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    monkeypatch.chdir(tmp_path)
    texts = [" ".join(f"w{(3 * i + j) % 40}" for j in range(2 + i % 9)) for i in range(160)]
    Path("texts.txt").write_text("\n".join(texts))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=tokenizer_in(tmp_path / "bert", texts), **sizes)).save_pretrained("bert")
    found = run("sentence_encoder.md", {"given": ("bert", "texts.txt", 0.5)})
    assert 0.5 < found["cosine"] < 1
    assert Path("small-encoder/tokenizer.json").exists()
    assert Path("small-encoder.onnx").exists()


@pytest.mark.slow
def test_a_speech_recogniser(tmp_path, monkeypatch):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    pairs = [(draw.standard_normal(4000 + 100 * i).astype("float32"), f"w{i % 7} w{i % 3} end") for i in range(28)]
    known = tokenizer_in(tmp_path / "whisper", [text for _, text in pairs])
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained("whisper")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    network = WhisperForConditionalGeneration(WhisperConfig(vocab_size=known, **sizes, **heads, **tokens))
    network.generation_config.suppress_tokens = network.generation_config.begin_suppress_tokens = None
    network.save_pretrained("whisper")
    Path("myspeech.py").write_text("pairs = []\n\n\ndef recordings():\n    return pairs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import myspeech

    myspeech.pairs[:] = pairs
    # With random weights no text ends before it is too long.
    found = run("speech_recogniser.md", {"given": ("whisper", 0.5)}, max_new_tokens="8")
    assert found["wrong_words"](found["again"]) == found["wrong_words"](found["small"])


@pytest.mark.slow
def test_your_own_task(tmp_path, monkeypatch, cli):
    (code,) = blocks("own_task.md")
    few, count = re.subn(r"range\((\d+)00\)", r"range(\g<1>0)", code)
    assert count == 2
    (tmp_path / "mytask.py").write_text(few)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = re.search(r"^    tspc (.*?)\n\n", (DOCS / "own_task.md").read_text(), re.DOTALL | re.MULTILINE)
    assert command is not None
    arguments = command.group(1).replace("\\\n", " ").split()
    assert "epochs=3" in arguments
    code, out, err = cli(*arguments, "epochs=1", "dataset.pretrain.steps=5", "calibration.samples=64")
    assert (code, err) == (0, "")
    assert out.count("closeness") >= 3
