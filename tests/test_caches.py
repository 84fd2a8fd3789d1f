"""Encoders, decoders and their caches: blocks of transformers run one after the other from what is kept of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tspc
from tspc.calibration.gathering import moments_of
from tspc.calibration.samples import Calibration, Samples
from tspc.data import called, masks_of
from tspc.layers.dense import has_inputs, kernel_of

SIZES = {"vocab_size": 50, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(5, 50, (8, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([[9], [5], [9], [9], [9], [9], [3], [9]])).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK, "use_cache": True}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=32, **SIZES))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=3, intermediate_size=48, **heads, **SIZES))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sides = {
        f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 2))
    }
    sides |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 20, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 4, "num_mel_bins": 8, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(d_model=32, **sides, **tokens, **SIZES))


SPEECH = {"input_features": torch.randn(8, 8, 40, generator=torch.Generator().manual_seed(1)), "labels": IDS[:, :7]}
NETWORKS = {"gpt2": (gpt2, TEXT), "llama": (llama, TEXT), "whisper": (whisper, SPEECH)}


def rows_seen(model: nn.Module, names: list[str], samples: Samples) -> dict[str, Tensor]:
    """What each layer is called with when the whole network runs, without padded positions."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    masks: list[Tensor] = []

    def see(name: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            x = next(iter((*args, *kwargs.values())))
            x = x if not isinstance(layer, nn.Conv1d) else x[..., None]
            mask = next((m for m in masks if m.shape == x.shape[:2]), torch.ones(x.shape[:2]).bool())
            rows[name].append(x[mask].clone() if x.ndim == 3 else x.flatten(0, -2))

        return hook

    handles = [model.get_submodule(n).register_forward_hook(see(n), with_kwargs=True) for n in names]
    with torch.no_grad():
        for batch in samples:
            masks[:] = masks_of(batch)
            called(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items() if found}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_walk_shows_what_the_whole_network_shows(kind):
    torch.manual_seed(0)
    make, given = NETWORKS[kind]
    if kind == "llama":  # what a tokenizer gives
        from transformers import BatchEncoding

        given = BatchEncoding(given)
    model = make().eval()
    names = [n for n, m in model.named_modules() if has_inputs(m) and not isinstance(m, nn.Conv1d)]
    settings = Calibration(batch_size=4, patches=10**9, memory=0, sensitivity=False)
    with Samples(given, settings) as samples:
        trace = samples.survey(model, names).trace
        found = dict(moments_of(model, names, samples, trace))
        wanted = rows_seen(model, names, samples)
    assert found.keys() == wanted.keys()
    blocks = [segment for segment in trace.segments if ".0" not in segment.module]
    assert blocks
    assert all(segment.follows for segment in blocks), "the cache is handed on"
    for name, rows in wanted.items():
        assert found[name].count == len(rows)
        layer = model.get_submodule(name)
        statistics = found[name].statistics(kernel_of(layer), False, 0.0)
        inputs = statistics.inputs[0] - statistics.damping[0] * torch.eye(rows.shape[1])
        torch.testing.assert_close(inputs.float(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("error::tspc.errors.TspcWarning")
def test_compressed_alike_from_memory_and_from_files(kind):
    make, given = NETWORKS[kind]
    torch.manual_seed(0)
    model = make().eval()
    small = [
        tspc.compress(model, "svd", 0.5, calibration=given, settings=Calibration(batch_size=4, memory=memory))
        for memory in (0, 64)
    ]
    states = [network.state_dict() for network in small]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
