"""What networks take and give: one batch of a call's arguments, and the tensor of an answer that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tspc.errors import DataError

MASKS = ("attention_mask", "padding_mask", "mask")
"""Names of arguments that say which positions hold something: 1 or true there, 0 or false at padded ones."""
ANSWERS = ("logits", "sentence_embedding", "image_embeds", "text_embeds", "last_hidden_state")
"""Names of an answer's tensors, the first of which that is there counts."""


class ModelInputs:
    """The arguments of a network for one batch: `positional` and `named`, for networks that take more than one tensor.

    A tensor whose first axis has the length of the batch holds a row for each input. The length of the batch is that of
    the first tensor. Other values (None, flags, tables that all inputs share) go to the network as they are. A tensor
    alone needs no such object; `called` takes both.
    """

    def __init__(self, positional: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> None:
        self.positional, self.named = tuple(positional), dict(named or {})
        first = next((value for value in self.values() if isinstance(value, Tensor) and value.ndim), None)
        if first is None:
            raise DataError("a batch of inputs holds no tensor with an axis for its inputs")
        self._first = first

    @property
    def first(self) -> Tensor:
        """The first tensor: the token numbers, the images."""
        return self._first

    @property
    def mask(self) -> Tensor | None:
        """Which positions hold something (N, L), as truth values; None if no argument says so."""
        found = next((self.named[name] for name in MASKS if isinstance(self.named.get(name), Tensor)), None)
        return None if found is None or found.ndim != 2 or len(found) != len(self) else found != 0

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

    def to(self, place: torch.device) -> ModelInputs:
        """The same on a device."""
        move = lambda value: value.to(place) if isinstance(value, Tensor) else value  # noqa: E731
        return ModelInputs(list(map(move, self.positional)), {name: move(value) for name, value in self.named.items()})

    def clone(self) -> ModelInputs:
        """A copy whose tensors may be changed in place."""
        return self._each(Tensor.clone, all_tensors=True)

    def _each(self, change: Callable[[Tensor], Tensor], all_tensors: bool = False) -> ModelInputs:
        """With `change` applied to the tensors that hold a row for each input."""

        def changed(value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and (all_tensors or (value.ndim > 0 and len(value) == len(self)))
            return change(value) if has_rows else value

        return ModelInputs(
            list(map(changed, self.positional)), {name: changed(value) for name, value in self.named.items()}
        )

    def __repr__(self) -> str:
        named = [*map(_shown, self.positional), *(f"{name}={_shown(value)}" for name, value in self.named.items())]
        return f"ModelInputs({', '.join(named)})"


Given = Tensor | ModelInputs
"""One batch of what a network takes."""


def _shown(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def arguments_of(batch: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a network's call, by position and by name."""
    return (batch.positional, batch.named) if isinstance(batch, ModelInputs) else ((batch,), {})


def called(model: Callable[..., Any], batch: Given) -> Any:
    """What a network answers to a batch."""
    positional, named = arguments_of(batch)
    return model(*positional, **named)


def answer_of(output: Any) -> Tensor | None:
    """The tensor of a network's answer that counts: the answer itself, its logits, its embeddings, its hidden states.

    Else it is the first floating-point tensor in a tuple or dict, but never a loss. None if there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = next((output[name] for name in ANSWERS if isinstance(output.get(name), Tensor)), None)
        return named if named is not None else _first_of(value for name, value in output.items() if name != "loss")
    named = next((getattr(output, name) for name in ANSWERS if isinstance(getattr(output, name, None), Tensor)), None)
    if named is not None or not isinstance(output, list | tuple):
        return named
    return _first_of(output)


def _first_of(values: Any) -> Tensor | None:
    return next(
        (cast(Tensor, value) for value in values if isinstance(value, Tensor) and value.is_floating_point()), None
    )
