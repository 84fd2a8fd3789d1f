"""Makes batches of one size from what a data loader gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tspc.data.arranging import collected, form_of
from tspc.data.model_inputs import Given, ModelInputs, first_of, has_lengths, joined
from tspc.errors import DataError


class Batches:
    """Batches of `batch_size` from the first `samples` inputs; some may be smaller.

    `inputs` is one batch, or an iterable of batches: a tensor (N, …), a tuple that begins with one, a dict of tensors,
    `ModelInputs`. All that a batch holds is kept, also labels, until a network says what it takes. Batches of the same
    sizes are joined. Texts and sequences of vectors may have other lengths in another batch, and so may what has a
    mask; images must have one size.

    Iteration raises DataError for other values, and for images of different sizes.
    """

    def __init__(self, inputs: Any, samples: int, batch_size: int) -> None:
        self._inputs = [inputs] if _is_one_batch(inputs) else inputs
        self._samples, self._size = samples, batch_size
        self.form: str = ""
        """The form of the loader's batches; see `tspc.data.arranging`."""

    def __iter__(self) -> Iterator[Given]:
        left, rest = self._samples, None
        for given in self._given():
            batch = given[:left]
            left -= len(batch)
            whole = None if rest is None else _joined(rest, batch)
            if whole is None:
                if rest is not None:
                    yield rest
                whole = batch.clone()  # a loader may use the memory again
            full = len(whole) - len(whole) % self._size
            if full:
                yield from whole[:full].split(self._size)
            rest = whole[full:] if full < len(whole) else None
            if left == 0:
                break
        if rest is not None:
            yield rest

    def _given(self) -> Iterator[Given]:
        for given in self._inputs.split(self._size) if isinstance(self._inputs, Tensor) else self._inputs:
            form = form_of(given)
            if form != (self.form or form):
                raise DataError(f"the first batch is a {self.form}, and a later one is {type(given).__name__}")
            self.form = form
            batch = collected(given)
            first = first_of(batch)
            if first.ndim == 0:
                raise DataError("calibration needs batches of inputs, not single numbers")
            if first.is_floating_point() and not bool(torch.isfinite(first).all()):
                raise DataError("a calibration image holds NaN or infinite values")
            if len(first):
                yield batch


def _joined(one: Given, other: Given) -> Given | None:
    """Both batches in one; None if their sizes differ and may do so."""
    first, second = first_of(one), first_of(other)
    if first.dtype != second.dtype:
        raise DataError(f"the calibration images are {first.dtype} and {second.dtype}; give one type")
    found = joined([one, other])
    if found is None and first.shape[1:] != second.shape[1:] and not has_lengths(one):
        sizes = f"{tuple(first.shape[1:])} and {tuple(second.shape[1:])}"
        raise DataError(f"the calibration images are not all of one size: {sizes}")
    return found


def _is_one_batch(inputs: Any) -> bool:
    """Whether this is what a loader gives once, inputs with masks or labels, and not several batches."""
    if isinstance(inputs, ModelInputs | Mapping) or dataclasses.is_dataclass(inputs) or hasattr(inputs, "_fields"):
        return True
    if not isinstance(inputs, tuple) or len(inputs) < 2:
        return False
    first, *others = inputs
    if not all(isinstance(item, Tensor) for item in others):
        return False
    if not isinstance(first, Tensor):  # inputs that belong together, and labels
        return isinstance(first, ModelInputs | Mapping | tuple)
    alike = all(item.dtype == first.dtype and item.shape[1:] == first.shape[1:] for item in others)
    is_mask = not first.is_floating_point() and all(bool((item <= 1).all()) for item in others)
    return not alike or (is_mask and not bool((first <= 1).all()))
