"""Puts single inputs, of different lengths, together to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tspc.data.model_inputs import Given, ModelInputs
from tspc.errors import DataError, shortened

IGNORED = -100
"""The target of a position that does not count."""

Example = tuple[Any, Any]
"""One input, as a dict of the network's arguments by name or as a tensor, and its target."""


def collated(examples: Sequence[Example], fills: Mapping[str, int] | None = None) -> tuple[Given, Tensor]:
    """A batch of inputs and their targets, on the CPU. An axis along which they differ is padded at its end.

    An argument is padded with its number in `fills`, or 0; so a mask of ones becomes 0 there. Targets of whole numbers
    are padded with -100, which counts nowhere. Raises DataError for inputs that do not fit together.
    """
    inputs, targets = [example[0] for example in examples], [example[1] for example in examples]
    wanted = padded([tensor_of(target, "a target") for target in targets], IGNORED, "the targets")
    if not isinstance(inputs[0], Mapping):
        return padded([tensor_of(value, "an input") for value in inputs], 0, "the inputs"), wanted
    names = list(inputs[0])
    if any(not isinstance(value, Mapping) or list(value) != names for value in inputs):
        raise DataError(f"all inputs must have the same arguments; the first has {', '.join(map(str, names))}")
    fills = fills or {}
    columns = {name: [tensor_of(value[name], name) for value in inputs] for name in names}
    return ModelInputs(
        named={name: padded(column, fills.get(name, 0), name) for name, column in columns.items()}
    ), wanted


def padded(tensors: Sequence[Tensor], fill: int, what: str) -> Tensor:
    """The tensors as rows of one; where their sizes differ, they are filled up. Raises DataError if they do not fit."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(list(tensors))
    axes = {len(shape) for shape in shapes}
    if len(axes) > 1:
        raise DataError(f"{what} have different numbers of axes: {', '.join(map(str, sorted(axes)))}")
    sizes = [max(sizes) for sizes in zip(*shapes, strict=True)]
    result = tensors[0].new_full((len(tensors), *sizes), fill)
    for row, tensor in zip(result, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return result


def tensor_of(value: Any, what: str) -> Tensor:
    """A tensor of a number, a list, an array or a tensor: float32 of floats, int64 of whole numbers.

    Raises DataError for anything else.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        text = shortened(error)
        raise DataError(
            f"{what} is {type(value).__name__}; expected numbers, a list, an array or a tensor ({text})"
        ) from error
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()
