"""PyTorch's attention with its matrices as dense layers, which can then be measured and tensorized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspc.layers.dense import shown_by
from tspc.layers.tensorized import as_one_node

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Attention(nn.MultiheadAttention):
    """Computes what an `nn.MultiheadAttention` computes; its four matrices are layers of their own.

    It is called with the same arguments, and `in_proj_weight` and the like are rebuilt where other code reads them.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """`attention` has parameters of its own; the new layers share their memory."""
        nn.Module.__init__(self)
        vars(self).update(shown_by(attention))
        # The encoder layers of PyTorch must call this module, and not read its matrices; this attribute says so.
        self._qkv_same_embed_dim = False
        self._own_parameters(attention)
        self.training = attention.training

    def _own_parameters(self, attention: nn.MultiheadAttention) -> None:
        for name, weight, bias in matrices_of(attention):
            self.add_module(name, as_linear(weight, bias))
        for name in ("bias_k", "bias_v"):
            vars(self).pop(name, None)
            self.register_parameter(name, getattr(attention, name))

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The three matrices as one, if they have the same sizes."""
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        return torch.cat(weights) if len({weight.shape[1] for weight in weights}) == 1 else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The three biases as one."""
        found = self.q_proj.bias, self.k_proj.bias, self.v_proj.bias
        return None if any(bias is None for bias in found) else torch.cat(found)

    @property
    def q_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.v_proj.weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The arguments and results are those of `nn.MultiheadAttention`."""
        if isinstance(query, torch.fx.Proxy):
            masks = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            how = {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
            return as_one_node(self, (query, key, value), masks | how)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_batched = query.dim() == 3
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        query, key, value = self._batch_first(query, key, value)
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        # As PyTorch does: the hint replaces the mask where nothing else needs the mask.
        is_hint = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if is_hint else attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * math.sqrt(1.0 / self.head_dim) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            found = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_hint)
        output = self.out_proj(found.transpose(1, 2).flatten(2))
        if not is_batched:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1).contiguous()), weights

    def _batch_first(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The inputs with the batch in front. Equal tensors stay one tensor, so that what is known of one is of all."""
        new: dict[int, Tensor] = {}
        for x in given:
            if id(x) not in new:
                new[id(x)] = x.unsqueeze(0) if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)
        return tuple(new[id(x)] for x in given)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, E) as (N, heads, L, E of one head)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as numbers that are added to the scores (N, heads, L, S)."""
        if attn_mask is not None:
            mask = attn_mask.unsqueeze(0) if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            attn_mask = self._fitting(_added(mask, dtype))
        if padding is None:
            return attn_mask
        padding = self._fitting(_added(padding, dtype))[:, None, None]
        return padding if attn_mask is None else attn_mask + padding

    def _fitting(self, mask: Tensor) -> Tensor:
        """A mask with zeros for the keys that this module has added."""
        return F.pad(mask, (0, (self.bias_k is not None) + self.add_zero_attn))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def as_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A dense layer that has these very parameters."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def matrices_of(attention: nn.MultiheadAttention) -> Iterator[tuple[str, nn.Parameter, nn.Parameter | None]]:
    """The four matrices and their biases, by the names of their layers; they share the memory of the parameters."""
    whole, three = attention.in_proj_weight, [getattr(attention, f"{x}_proj_weight") for x in "qkv"]
    weights = _thirds(cast(nn.Parameter, whole)) if whole is not None else three
    biases = [None] * 3 if attention.in_proj_bias is None else _thirds(cast(nn.Parameter, attention.in_proj_bias))
    yield from zip(PARTS, weights, biases, strict=False)
    yield PARTS[-1], cast(nn.Parameter, attention.out_proj.weight), cast(Any, attention.out_proj.bias)


def _thirds(whole: nn.Parameter) -> list[nn.Parameter]:
    """The three parts of a parameter, as parameters that share its memory."""
    return [nn.Parameter(part, whole.requires_grad) for part in whole.detach().chunk(3)]
