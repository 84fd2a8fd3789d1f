"""Networks of transformers as tspc runs them: they take the network's own arguments and give one tensor."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tspc.errors import ConfigError

POOLINGS = ("mean", "cls", "max")
"""How the vectors of a text's tokens become one."""
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}


class Wrapped(nn.Module):
    """A network of transformers in `network`, which is called with the same arguments, by position or by name.

    A subclass says which tensor of the answer it returns. `describe` gives what builds it again around a network.
    `may_lack` has parts of the names of weights on which the answer does not depend.
    """

    may_lack: tuple[str, ...] = ("masked_spec_embed",)  # it hides parts of a sound in training alone

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.takes_cache = "use_cache" in inspect.signature(network.forward).parameters

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """The inputs on which transformers itself tries the network."""
        return self.network.dummy_inputs  # type: ignore[return-value]

    def describe(self) -> dict[str, Any]:
        """The class and its settings, as plain data."""
        return {"kind": type(self).__name__}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The texts that the network writes, by its own `generate`; AttributeError if it has none."""
        return cast(Any, self.network).generate(*args, **kwargs)

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """What the network itself answers, without the caches of a decoder, which only `generate` uses."""
        if self.takes_cache:
            kwargs.setdefault("use_cache", False)
        return self.network(*args, **kwargs)


class Classifier(Wrapped):
    """Returns the logits (N × classes) of images (N, C, H, W) or token numbers (N, L)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.answer(*args, **kwargs).logits


class Regression(Classifier):
    """Returns a number for each text (N × 1)."""


class LanguageModel(Wrapped):
    """Returns the logits of the next token, or of the masked ones, at every position (N × L × vocabulary)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.answer(*args, **kwargs).logits


class Speech(Wrapped):
    """Returns logits (N × L × vocabulary).

    An encoder with a decoder, such as Whisper, takes `input_features` and `decoder_input_ids`; L is the length of the
    latter. An encoder alone, such as wav2vec 2.0, takes `input_values` and answers for every frame (CTC).
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.answer(*args, **kwargs).logits


class Features(Wrapped):
    """Returns the last hidden state (N × L × width, or as the network has it) of a network without a head."""

    may_lack = (*Wrapped.may_lack, "pooler.")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = self.answer(*args, **kwargs)
        return found.last_hidden_state if hasattr(found, "last_hidden_state") else found[0]


class SentenceEmbeddings(Wrapped):
    """Returns a vector for each text (N × width).

    It is the mean (`pooling="mean"`), the largest entries (`max`) or the first (`cls`) of the vectors of its tokens, as
    in sentence-transformers. Positions that `attention_mask` (N, L) leaves out do not count. With `normalise` vectors
    have length 1.
    """

    may_lack = (*Wrapped.may_lack, "pooler.")

    def __init__(self, network: nn.Module, pooling: str = "mean", normalise: bool = True) -> None:
        super().__init__(network)
        if pooling not in POOLINGS:
            raise ConfigError([f"pooling={pooling!r} of sentence embeddings: choose one of {', '.join(POOLINGS)}"])
        self.pooling, self.normalise = pooling, normalise

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"pooling": self.pooling, "normalise": self.normalise}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        states = self.answer(*args, **kwargs).last_hidden_state
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        pooled = _pooled(states, mask, self.pooling)
        return F.normalize(pooled, dim=-1) if self.normalise else pooled


KINDS: dict[str, type[Wrapped]] = {
    kind.__name__: kind for kind in (Classifier, Regression, LanguageModel, Speech, Features, SentenceEmbeddings)
}
"""The wrappers by their names in a file."""


def wrapped(network: nn.Module, described: Any) -> Wrapped:
    """The wrapper that `Wrapped.describe` told of. Raises ConfigError if there is none such."""
    settings = dict(described) if isinstance(described, dict) else {}
    kind = KINDS.get(str(settings.pop("kind", None)))
    if kind is None or not settings.keys() <= {"pooling", "normalise"}:
        raise ConfigError([f"{described!r} is no way to use a network; choose one of {', '.join(KINDS)}"])
    try:
        return kind(network, **settings)
    except TypeError as error:
        raise ConfigError([f"{kind.__name__} takes no {', '.join(settings)}"]) from error


def _pooled(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One vector for each text, from those of its tokens (N × L × width)."""
    if pooling == "cls":
        return states[:, 0]
    if mask is None:
        return states.mean(1) if pooling == "mean" else states.amax(1)
    held = mask.unsqueeze(-1).to(states.dtype)
    if pooling == "mean":
        return (states * held).sum(1) / held.sum(1).clamp_min(1e-9)
    return states.masked_fill(held == 0, float("-inf")).amax(1)


def pooling_of(folder: str | Path) -> dict[str, Any]:
    """The pooling and normalisation that a folder of sentence-transformers tells; without such files the usual ones.

    Raises ConfigError for a pooling that is not known here.
    """
    listed = _json(Path(folder, "modules.json"))
    if not isinstance(listed, list):
        return {}
    parts = [part for part in listed if isinstance(part, dict)]
    kinds = {str(part.get("type", "")).rpartition(".")[2]: str(part.get("path", "")) for part in parts}
    found: dict[str, Any] = {"normalise": "Normalize" in kinds}
    told = _json(Path(folder, kinds.get("Pooling", "1_Pooling"), "config.json"))
    if isinstance(told, dict):
        modes = [mode for key, mode in _MODES.items() if told.get(key)]
        named = [told["pooling_mode"]] if isinstance(told.get("pooling_mode"), str) else told.get("pooling_mode") or []
        chosen = modes or list(named)
        others = [key for key, value in told.items() if key.startswith("pooling_mode_") and value is True]
        if len(chosen) != 1 or chosen[0] not in POOLINGS or set(others) - set(_MODES):
            said = ", ".join(others or map(str, chosen)) or "none"
            raise ConfigError([f"{folder} pools tokens by {said}; tspc knows one of {', '.join(POOLINGS)}"])
        found["pooling"] = chosen[0]
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot read {path}: {error}; remove it, or fetch it again"]) from error
