"""What networks take and give: one batch of a call's arguments, and the tensor of an answer that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tspc.data.padding import INVERTED, MASKS, filled_positions, is_mask, is_shared
from tspc.errors import DataError

KINDS = 4
"""So many kinds of batches show how a network's blocks call each other: other lengths, with and without padding."""


class ModelInputs:
    """The arguments of a network for one batch: `positional` and `named`, for networks that take more than one tensor.

    A tensor whose first axis has the length of the batch holds a row for each input. The length of the batch is that of
    the first tensor. Other values (None, flags, tables that all inputs share) go to the network as they are. A tensor
    alone needs no such object; `called` takes both.
    """

    def __init__(self, positional: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> None:
        self.positional, self.named = tuple(positional), dict(named or {})
        inputs = [value for name, value in self.named.items() if not is_mask(name)]
        found = [v for v in (*self.positional, *inputs, *self.named.values()) if isinstance(v, Tensor) and v.ndim]
        if not found:
            raise DataError("a batch of inputs holds no tensor with an axis for its inputs")
        self._first = found[0]

    @property
    def first(self) -> Tensor:
        """The first tensor that is no mask: the token numbers, the images."""
        return self._first

    @property
    def mask(self) -> Tensor | None:
        """Which positions hold something (N, L), as truth values; None if no argument says so."""
        return next(iter(self.masks), None)

    @property
    def masks(self) -> list[Tensor]:
        """All such masks: an encoder and a decoder may have one each. A mask of another shape says nothing here."""
        found = []
        others = [value for name, value in [*enumerate(self.positional), *self.named.items()] if not is_mask(str(name))]
        for name in dict.fromkeys([*(name for name in (*MASKS, *INVERTED) if name in self.named), *self.named]):
            value = self.named[name]
            is_given = isinstance(value, Tensor) and value.ndim == 2 and len(value) == len(self)
            if is_mask(name) and is_given and not is_shared(name, value, self.first):
                found.append(filled_positions(name, value, others))
        return found

    def values(self) -> Iterator[Any]:
        """All arguments, those by position first."""
        yield from self.positional
        yield from self.named.values()

    def __len__(self) -> int:
        """The number of inputs in the batch."""
        return len(self._first)

    def __getitem__(self, rows: slice | Tensor) -> ModelInputs:
        """Some inputs of the batch."""
        return self._each(lambda tensor: tensor[rows])

    def split(self, size: int) -> list[ModelInputs]:
        """Parts of `size` inputs; the last one may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def chunk(self, parts: int) -> list[ModelInputs]:
        """As `Tensor.chunk`: about so many parts of equal size."""
        return self.split(-(-len(self) // parts))

    def is_floating_point(self) -> bool:
        """Whether the first tensor holds real numbers, and not the numbers of tokens."""
        return self.first.is_floating_point()

    def to(self, place: torch.device) -> ModelInputs:
        """The same on a device."""
        move = lambda value: value.to(place) if isinstance(value, Tensor) else value  # noqa: E731
        return ModelInputs(list(map(move, self.positional)), {name: move(value) for name, value in self.named.items()})

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> ModelInputs:
        """The same in a layout of the memory; channels last is for images alone."""

        def change(tensor: Tensor) -> Tensor:
            is_image = tensor.ndim == 4 and tensor.is_floating_point()
            return tensor.contiguous(memory_format=memory_format if is_image else torch.contiguous_format)

        return self._each(change, all_tensors=True)

    def double(self) -> ModelInputs:
        """The same with its real numbers in float64."""
        return self._each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, all_tensors=True)

    def detach(self) -> ModelInputs:
        """The same without a history of gradients."""
        return self._each(Tensor.detach, all_tensors=True)

    def clone(self) -> ModelInputs:
        """A copy whose tensors may be changed in place."""
        return self._each(Tensor.clone, all_tensors=True)

    def _each(self, change: Callable[[Tensor], Tensor], all_tensors: bool = False) -> ModelInputs:
        """With `change` applied to the tensors that hold a row for each input."""

        def changed(name: str, value: Any) -> Any:
            is_tensor = isinstance(value, Tensor)
            return change(value) if is_tensor and (all_tensors or self._has_rows(name, value)) else value

        positional = [changed("", value) for value in self.positional]
        return ModelInputs(positional, {name: changed(name, value) for name, value in self.named.items()})

    def _has_rows(self, name: str, value: Tensor) -> bool:
        """Whether an argument, without a name if it goes by position, has a row for each input."""
        return value.ndim > 0 and len(value) == len(self) and not is_shared(name, value, self.first)

    def __repr__(self) -> str:
        named = [*map(_shown, self.positional), *(f"{name}={_shown(value)}" for name, value in self.named.items())]
        return f"ModelInputs({', '.join(named)})"


Given = Tensor | ModelInputs
"""One batch of what a network takes."""


def first_of(batch: Given) -> Tensor:
    """The first tensor of a batch; the batch itself if it is a tensor."""
    return batch.first if isinstance(batch, ModelInputs) else batch


def masks_of(batch: Given) -> list[Tensor]:
    """Which positions of a batch hold something (N, L): one mask for each shape, and none where nothing is padded.

    If an encoder and a decoder have masks of the same shape, a position counts where either says so.
    """
    found: dict[torch.Size, Tensor] = {}
    for mask in batch.masks if isinstance(batch, ModelInputs) else ():
        found[mask.shape] = found[mask.shape] | mask if mask.shape in found else mask
    return [mask for mask in found.values() if not bool(mask.all())]


def shapes_of(batch: Given) -> tuple[torch.Size, ...]:
    """The shapes of all tensors with axes of a batch: those of a decoder differ where an encoder's are alike."""
    positional, named = arguments_of(batch)
    return tuple(value.shape for value in (*positional, *named.values()) if isinstance(value, Tensor) and value.ndim)


def has_lengths(batch: Given) -> bool:
    """Whether another batch may have inputs of other sizes: texts, sequences of vectors, inputs with masks.

    Images and rows of numbers alone must have one size.
    """
    first = first_of(batch)
    is_named = isinstance(batch, ModelInputs) and (first.ndim == 2 or any("mask" in name for name in batch.named))
    return not first.is_floating_point() or first.ndim == 3 or is_named


def sizes_of(batch: Given) -> tuple[Any, ...]:
    """The sizes of a batch's inputs, without their number: those of batches that may be joined are equal."""
    positional, named = arguments_of(batch)
    values = [*enumerate(positional), *named.items()]
    return tuple(
        (name, tuple(v.shape[1:]), str(v.dtype)) if isinstance(v, Tensor) else (name, repr(v)) for name, v in values
    )


def joined(batches: Sequence[Given]) -> Given | None:
    """Several batches in one; None if they do not fit together: other lengths, other arguments, what they share."""
    first = batches[0]
    if isinstance(first, Tensor):
        parts = [batch for batch in batches if isinstance(batch, Tensor)]
        fit = len(parts) == len(batches) and all(part.shape[1:] == first.shape[1:] for part in parts)
        return torch.cat(parts) if fit else None
    given = [arguments_of(batch) for batch in batches]
    if any(len(places) != len(given[0][0]) or named.keys() != given[0][1].keys() for places, named in given):
        return None
    firsts = [first_of(batch) for batch in batches]
    names = ["" for _ in given[0][0]] + list(given[0][1])
    rows = [[*places, *named.values()] for places, named in given]
    columns = [
        _joined_column(name, list(column), firsts) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    ]
    if any(not fits for _, fits in columns):
        return None
    values = [value for value, _ in columns]
    count = len(given[0][0])
    return ModelInputs(values[:count], dict(zip(given[0][1], values[count:], strict=True)))


def _joined_column(name: str, values: list[Any], firsts: list[Tensor]) -> tuple[Any, bool]:
    """The same argument of several batches with these first tensors, and whether its values fit together."""
    if all(isinstance(value, Tensor) for value in values):
        first: Tensor = values[0]
        if all(is_shared(name, value, inputs) for value, inputs in zip(values, firsts, strict=True)):
            return first, all(torch.equal(value, first) for value in values)
        alike = all(value.shape[1:] == first.shape[1:] and value.dtype == first.dtype for value in values)
        rows = all(value.ndim and len(value) == len(inputs) for value, inputs in zip(values, firsts, strict=True))
        return (torch.cat(values), True) if alike and rows else (None, False)
    is_constant = all(value is None or isinstance(value, bool | int | float | str) for value in values)
    return values[0], is_constant and all(value == values[0] for value in values)


def few_of(batch: Given, masks: Sequence[Tensor]) -> Given:
    """Two inputs of a batch; one of them is padded if any input is, as the `masks` of the batch say."""
    if not masks or bool((~masks[0][:2]).any()):
        return batch[:2]
    return batch[torch.tensor([int(masks[0].sum(1).argmin()), 0])]


def kind_of(shapes: Sequence[torch.Size], masks: Sequence[Tensor]) -> tuple[Any, ...]:
    """What batches of one kind have in common: the `shapes` of their tensors without the first axis, and padding."""
    return tuple(shape[1:] for shape in shapes), bool(masks)


def kinds_of(batches: Iterable[Given]) -> list[Given]:
    """Two inputs of the first batch, and of the first batches of other sizes, with and without padding."""
    found: dict[Any, Given] = {}
    for batch in batches:
        masks = masks_of(batch)
        kind = kind_of(shapes_of(batch), masks)
        if len(found) < KINDS and kind not in found:
            found[kind] = few_of(batch, masks)
    return list(found.values())


def filled(answer: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The rows of an answer (N, L, …) at positions that hold something; the answer itself if no mask has its shape."""
    mask = next((mask for mask in masks if mask.shape == answer.shape[:2]), None)
    return answer if mask is None else answer[mask.to(answer.device)]


def unpadded(answer: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """An answer (N, L, …) with zeros at padded positions; the answer itself if no mask has its shape."""
    mask = next((mask for mask in masks if mask.shape == answer.shape[:2]), None)
    if mask is None:
        return answer
    return answer.masked_fill(~mask.to(answer.device).reshape(*mask.shape, *[1] * (answer.ndim - 2)), 0)


def _shown(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def arguments_of(batch: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a network's call, by position and by name."""
    return (batch.positional, batch.named) if isinstance(batch, ModelInputs) else ((batch,), {})


def called(model: Callable[..., Any], batch: Given) -> Any:
    """What a network answers to a batch."""
    positional, named = arguments_of(batch)
    return model(*positional, **named)
