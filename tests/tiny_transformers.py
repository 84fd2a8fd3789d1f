"""Tiny random networks of transformers, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PICTURES = SMALL | {"image_size": 32, "patch_size": 16}
TOKENS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WHISPER = {
    **{"vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64},
    **{"decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8},
    **{"max_source_positions": 30, "max_target_positions": 20, "decoder_start_token_id": 1, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None},
}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "bert", SMALL | TOKENS),
    "gpt2": ("GPT2LMHeadModel", "gpt2", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", "llama", SMALL | TOKENS | {"num_key_value_heads": 1, "max_position_embeddings": 64}),
    "whisper": ("WhisperForConditionalGeneration", "whisper", WHISPER),
    "vit": ("ViTForImageClassification", "vit", PICTURES | {"num_labels": 4}),
    "clip": ("CLIPVisionModelWithProjection", "clip_vision_model", PICTURES | {"projection_dim": 16}),
}
"""For each network its class, the type of its configuration, and fields of that."""


def tiny(name: str, **changes: Any) -> nn.Module:
    """A random network in eval mode, with other fields of its configuration where there are `changes`."""
    import transformers

    kind, type_name, fields = KINDS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.AutoConfig.for_model(type_name, **fields | changes)).eval()


def batch_of(name: str, count: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """A batch of a network's arguments; the last text is shorter."""
    generator = torch.Generator().manual_seed(count + length)
    if name in ("vit", "clip"):
        return {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, 50, (count, length), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(count, 8, 60, generator=generator), "decoder_input_ids": ids}
    mask = torch.ones(count, length, dtype=torch.long)
    mask[-1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
