"""Whether the calibration inputs are texts: their rows are words, which differ more than the positions of an image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tspc.calibration.weights import has_tokens
from tspc.data.model_inputs import Given, answer_of, arguments_of, called
from tspc.data.padding import is_mask
from tspc.traversal.hooks import evaluating


def tokens_of(batch: Given) -> Tensor | None:
    """The first tensor with whole numbers in rows, that is no mask: the numbers of tokens; None if there is none.

    It need not be the first argument: a speech recogniser takes a sound, and the text that was said so far.
    """
    positional, named = arguments_of(batch)
    inputs = [*positional, *(value for name, value in named.items() if not is_mask(name))]
    found = (value for value in inputs if isinstance(value, Tensor) and value.ndim > 1)
    return next((value for value in found if not value.is_floating_point() and value.dtype != torch.bool), None)


def is_text(samples: Iterable[Given]) -> bool:
    """Whether token numbers are among the inputs."""
    return tokens_of(next(iter(samples))) is not None


@torch.no_grad()
def is_encoder(model: nn.Module, samples: Iterable[Given]) -> bool:
    """Whether token numbers are among the inputs, and the answer is not that of a language model."""
    with evaluating(model):
        return is_text(samples) and not has_tokens(answer_of(called(model, next(iter(samples))[:1])))
