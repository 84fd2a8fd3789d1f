"""The tensor that counts in what a network answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from tspc.data.model_inputs import Given, called
from tspc.errors import DataError

ANSWERS = ("logits", "logits_per_image", "sentence_embedding", "image_embeds", "text_embeds", "last_hidden_state")
"""Names of an answer's tensors, the first of which that is there counts. Those of images beside texts tell of both."""


def named_answer(output: Any) -> Tensor | None:
    """The tensor with one of the names of `ANSWERS` in a dict or an object; None if there is none."""
    read = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
    return next((value for value in map(read, ANSWERS) if isinstance(value, Tensor)), None)


def answer_of(output: Any) -> Tensor | None:
    """The tensor of a network's answer that counts: the answer itself, its logits, its embeddings, its hidden states.

    Else it is the first floating-point tensor in a tuple or dict, but never a loss. None if there is none.
    """
    if isinstance(output, Tensor):
        return output
    named = named_answer(output)
    if named is not None:
        return named
    if isinstance(output, Mapping):
        return _first_of(value for name, value in output.items() if name != "loss")
    return _first_of(output) if isinstance(output, list | tuple) else None


def answered(model: Callable[..., Any], batch: Given) -> Tensor:
    """The tensor that counts in what a network answers to a batch. Raises DataError if there is none."""
    output = called(model, batch)
    found = answer_of(output)
    if found is None:
        raise DataError(
            f"{type(model).__name__} answers with {type(output).__name__}, which holds no tensor of real numbers; "
            "wrap the network in a module that returns the tensor to learn from"
        )
    return found


def _first_of(values: Iterable[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
