"""Makes batches of images from a data loader, and checks whether the rest of a batch may be left out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import DataError

REMEDY = (
    "wrap the network in a module whose forward takes one tensor and makes the others from it, "
    "or give the first tensors alone if the others are labels"
)


class Batches:
    """Batches of `batch_size` from the first `samples` images (the last one may be smaller).

    `images` is a tensor (N, …), or an iterable of batches. A batch is a tensor, or a tuple that begins with a tensor.
    Iteration raises DataError for other values, and for images of different sizes.
    """

    def __init__(self, images: Tensor | Iterable[Any], samples: int, batch_size: int) -> None:
        self._images = [images] if _is_one_batch(images) else images
        self._samples, self._size = samples, batch_size
        self.first: Any = None
        """What the loader gave first."""

    def __iter__(self) -> Iterator[Tensor]:
        left, rest = self._samples, []
        for given in self._images.split(self._size) if isinstance(self._images, Tensor) else self._images:
            self.first = given if self.first is None else self.first
            rest.append(_images_of(given)[:left])
            left -= len(rest[-1])
            if rest[-1].dtype != rest[0].dtype:
                raise DataError(f"the calibration images are {rest[0].dtype} and {rest[-1].dtype}; give one type")
            try:
                joined = torch.cat(rest)
            except RuntimeError as error:
                raise DataError(f"the calibration images are not all of one size: {error}") from error
            full = len(joined) - len(joined) % self._size
            if full:
                yield from joined[:full].split(self._size)
            rest = [joined[full:]]
            if left == 0:
                break
        if rest and len(rest[0]):
            yield rest[0]


def _is_one_batch(images: Any) -> bool:
    """Whether a tuple of tensors is what a loader gives once, inputs with masks or labels, and not several batches."""
    if not isinstance(images, tuple) or len(images) < 2 or not all(isinstance(item, Tensor) for item in images):
        return False
    first, *others = images
    alike = all(item.dtype == first.dtype and item.shape[1:] == first.shape[1:] for item in others)
    is_mask = not first.is_floating_point() and all(bool((item <= 1).all()) for item in others)
    return not alike or (is_mask and not bool((first <= 1).all()))


def _images_of(given: Any) -> Tensor:
    batch = given[0] if isinstance(given, tuple | list) and given else given
    if not isinstance(batch, Tensor):
        kind = "" if batch is given else f" in a {type(given).__name__}"
        raise DataError(
            "calibration needs tensors, or tuples that begin with one and go on with labels, not "
            f"{type(batch).__name__}{kind}; {REMEDY}"
        )
    if batch.ndim == 0:
        raise DataError("calibration needs batches of inputs, not single numbers")
    if batch.is_floating_point() and not bool(torch.isfinite(batch).all()):
        raise DataError("a calibration image holds NaN or infinite values")
    return batch


def check_nothing_is_missing(model: nn.Module, given: Any) -> None:
    """Raises DataError if the network would use more of the first batch than its first tensor.

    For example, padding would be treated as text without its mask. Labels may be left out. These are items without an
    argument of `forward`, items for an argument for labels, and one number for each input if the argument is optional.
    """
    if not isinstance(given, tuple | list) or len(given) < 2:
        return
    first, *others = given
    arguments = _arguments(model)[1:]
    for number, other in enumerate(others):
        name = _taker(first, other, arguments[number : number + 1], arguments)
        if name is not None:
            shape = f"the tensor of shape {tuple(other.shape)}" if isinstance(other, Tensor) else type(other).__name__
            raise DataError(
                f"the network takes '{name}' beside its first input, and calibration would leave it out "
                f"({shape} at place {number + 2} of a batch); {REMEDY}"
            )


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    """The arguments of `forward`; if the network only wraps another one, those of the inner network."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        if not all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _signature(model)):
            break
        model = inner
    return _signature(model)


def _signature(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _taker(first: Tensor, other: Any, own: list[inspect.Parameter], arguments: list[inspect.Parameter]) -> str | None:
    """The argument that takes a further item of a batch; `own` has the argument at its place, if there is one."""
    if isinstance(other, Mapping):
        named = {argument.name for argument in arguments if not _is_for_labels(argument)}
        return next((key for key in other if key in named), None)
    if not isinstance(other, Tensor):
        return None
    for argument in own:
        is_plain = argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
        if is_plain and argument.default is argument.empty:
            return argument.name
        if is_plain and argument.default is None and _suits(argument, first, other):
            return argument.name
    # Found by name: masks are often passed by name, in any order.
    masks = [argument for argument in arguments if "mask" in argument.name.lower()]
    return next((mask.name for mask in masks if _suits(mask, first, other)), None)


def _suits(argument: inspect.Parameter, first: Tensor, other: Tensor) -> bool:
    """Whether a tensor can be the value of an optional argument."""
    name = argument.name.lower()
    if _is_for_labels(argument):
        return False
    if other.ndim < 2:
        return any(word in name for word in ("len", "time", "step"))
    if "mask" in name and not other.is_floating_point() and other.dtype != torch.bool and bool((other > 1).any()):
        return False  # numbers of classes, or of tokens to be told
    return (
        other.shape[:2] == first.shape[:2]
        or other.shape[-1] == first.shape[-1]
        or other.shape[1:] == first.shape[2:]
        or other.shape[-2:] == first.shape[-2:]
    )


def _is_for_labels(argument: inspect.Parameter) -> bool:
    return any(word in argument.name.lower() for word in ("label", "target", "answer", "ground_truth"))
