"""Whether the calibration inputs are texts: their rows are words, which differ more than the positions of an image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tspc.calibration.weights import has_tokens
from tspc.data.answers import answer_of
from tspc.data.model_inputs import Given, arguments_of, called, first_of
from tspc.errors import DataError
from tspc.traversal.hooks import evaluating

OTHERS = ("mask", "label", "size", "length")
"""Parts of the names of arguments whose whole numbers are no tokens: which pixels count, the sizes of images."""


def tokens_of(batch: Given) -> Tensor | None:
    """The numbers of tokens among the inputs; None if there are none.

    They are the first tensor, or a named one (N, L): a speech recogniser takes a sound, and the text said so far.
    """
    if not batch.is_floating_point():
        return first_of(batch)
    named = arguments_of(batch)[1].items()
    rows = [v for name, v in named if isinstance(v, Tensor) and v.ndim == 2 and not any(o in name for o in OTHERS)]
    return next((value for value in rows if not value.is_floating_point() and value.dtype != torch.bool), None)


def is_text(samples: Iterable[Given]) -> bool:
    """Whether token numbers are among the inputs."""
    return tokens_of(next(iter(samples))) is not None


@torch.no_grad()
def is_encoder(model: nn.Module, samples: Iterable[Given]) -> bool:
    """Whether token numbers are among the inputs, and the answer is not that of a language model."""
    with evaluating(model):
        return is_text(samples) and not has_tokens(answer_of(called(model, next(iter(samples))[:1])))


@torch.no_grad()
def check_tokens(model: nn.Module, samples: Iterable[Given]) -> None:
    """Raises DataError if the network has no token of the largest or the smallest number in the inputs."""
    found: dict[int, Given] = {}
    for batch in samples if is_text(samples) else ():
        tokens = tokens_of(batch)
        if tokens is not None and tokens.ndim > 1:
            rows = tokens.flatten(1)
            for number, row in ((int(rows.max()), rows.amax(1).argmax()), (int(rows.min()), rows.amin(1).argmin())):
                found.setdefault(number, batch[int(row) : int(row) + 1])
    for number in {min(found), max(found)} if found else ():
        try:
            with evaluating(model):
                called(model, found[number])
        except IndexError as error:
            told = f"the network does not know the token {number} of the calibration inputs ({error})"
            raise DataError(f"{told}; are they from this network's tokenizer?") from error
        except Exception:  # another reason, which is told where all inputs are tried
            return
