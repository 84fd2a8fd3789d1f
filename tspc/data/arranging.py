"""Which arguments a network takes of what a loader gives: by name, or by place; labels are left out."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data.model_inputs import Given, ModelInputs
from tspc.errors import DataError, TspcWarning, some

REMEDY = (
    "give tspc.ModelInputs(positional, named), the arguments of the network's call, "
    "or wrap the network in a module whose forward takes one tensor and makes the others from it"
)
LABELS = ("label", "target", "answer", "ground_truth", "start_positions", "end_positions")
"""Words in the names of arguments and keys that are for labels."""
CACHE = "use_cache"
"""An argument of decoders that write texts token by token. In a single pass a cache is of no use and takes memory."""
TENSOR, ITEMS, FIELDS, NAMED, EXACT = "tensor", "items", "fields", "named", "exact"
"""Forms of a loader's batches: a tensor, a tuple, a tuple with names, a dict, `ModelInputs`."""


def form_of(given: Any) -> str:
    """The form of a batch. Raises DataError for one that is none."""
    if isinstance(given, ModelInputs):
        return EXACT
    if isinstance(given, Mapping):
        return NAMED
    if dataclasses.is_dataclass(given) or hasattr(given, "_fields"):
        return FIELDS
    if isinstance(given, tuple | list) and given:
        inner = given[0]
        # Inputs that belong together, and then their labels.
        return form_of(inner) if not isinstance(inner, Tensor) and _is_batch(inner) else ITEMS
    if isinstance(given, Tensor):
        return TENSOR
    raise DataError(f"a batch is {type(given).__name__}; expected tensors, tuples or dicts of them; {REMEDY}")


def _is_batch(given: Any) -> bool:
    is_kind = isinstance(given, ModelInputs | Mapping | tuple | list) or dataclasses.is_dataclass(given)
    return is_kind and not isinstance(given, str)


def collected(given: Any) -> Given:
    """All that a batch holds, before a network is known: a tensor, or `ModelInputs` with labels and all.

    Raises DataError if its inputs are no tensors.
    """
    form = form_of(given)
    if isinstance(given, Tensor | ModelInputs):
        return given
    if isinstance(given, tuple | list) and form != FIELDS and not isinstance(given[0], Tensor) and _is_batch(given[0]):
        return collected(given[0])
    if form == ITEMS:
        return _items(given)
    named = _fields(given) if form == FIELDS else dict(given)
    if not any(isinstance(value, Tensor) and value.ndim for value in named.values()):
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in named.items())
        raise DataError(f"a batch is {type(given).__name__} without tensors ({kinds}); make tensors of its values")
    return ModelInputs((), named)


def _fields(given: Any) -> dict[str, Any]:
    """The values of a dataclass or a namedtuple, by name."""
    names: Any = getattr(given, "_fields", None) or [field.name for field in dataclasses.fields(given)]
    return {name: getattr(given, name) for name in names}


def _items(given: Any) -> Given:
    """A tuple that begins with a tensor. Other values than tensors and dicts are labels, texts or numbers of rows."""
    first, *others = given
    if not isinstance(first, Tensor):
        raise DataError(
            "a batch must be a tensor, or begin with one, and go on with labels or further arguments, not "
            f"{type(first).__name__} in a {type(given).__name__}; {REMEDY}"
        )
    if first.ndim == 0:
        raise DataError("a batch must hold inputs, not single numbers")
    named = {key: value for other in others if isinstance(other, Mapping) for key, value in other.items()}
    positional = [other if isinstance(other, Tensor) else None for other in others]
    return ModelInputs((first, *positional), named) if others else first


def arranged(model: nn.Module, batch: Given, form: str) -> Given:
    """The arguments that `model` takes of a batch of this form, as `collected` gives it.

    - A dict goes by name. Keys for labels are left out, and keys that `forward` does not take; all keys but those for
      labels are taken by a forward with `**kwargs`.
    - Of a tuple the first item is the first argument. A further item is taken if `forward` has an argument for it: at
      its place, or a mask by its name. Labels are left out.
    - A namedtuple or dataclass goes by name if `forward` takes its first field, else as a tuple.
    - `ModelInputs` go as they are.

    The result is a tensor if the network takes one alone. Networks that can keep a cache of their attention are told
    not to. Raises DataError if nothing of a dict is taken, or two items are for one argument.
    """
    arguments = _arguments(model)
    if isinstance(batch, Tensor):
        found: Given = batch
    elif form == EXACT:
        found = _with_names(batch, arguments)
    elif form == NAMED or (form == FIELDS and next(iter(batch.named)) in {argument.name for argument in arguments}):
        found = _by_name(model, batch, arguments)
    else:
        items = batch if form == ITEMS else ModelInputs(tuple(batch.named.values()))
        found = _by_place(items, arguments)
    if not any(argument.name == CACHE for argument in arguments):
        return found
    positional, named = (found.positional, found.named) if isinstance(found, ModelInputs) else ((found,), {})
    return ModelInputs(positional, {CACHE: False} | named)


def inputs_of(model: nn.Module, given: Any) -> Given:
    """The arguments that `model` takes of one batch in any form. Raises DataError as `collected` and `arranged` do."""
    return arranged(model, collected(given), form_of(given))


def as_positional(model: nn.Module, batch: Given) -> tuple[Tensor, ...]:
    """The tensors of a call by position, for what takes no names, such as the graph of a network.

    Raises DataError if the call has other values, or leaves out an argument between two tensors.
    """
    if isinstance(batch, Tensor):
        return (batch,)
    left = {name: value for name, value in batch.named.items() if name != CACHE and value is not None}
    found = list(batch.positional)
    for argument in _arguments(model)[len(found) :]:
        if argument.name not in left:
            break
        found.append(left.pop(argument.name))
    if left or not all(isinstance(value, Tensor) for value in found):
        raise DataError(
            f"{type(model).__name__} is called with {some(batch.named) or 'other values than tensors'}, which cannot "
            "go by position: wrap the network in a module whose forward takes these tensors one after the other"
        )
    return tuple(found)


def labels_of(batch: Given) -> Tensor | None:
    """The tensor for labels in a dict, as `collected` gives it; None if there is none."""
    named = batch.named if isinstance(batch, ModelInputs) else {}
    return next((value for name, value in named.items() if is_for_labels(name) and isinstance(value, Tensor)), None)


def with_labels(model: nn.Module, batch: Given, form: str) -> Given:
    """As `arranged`, with the labels: some networks make a further input from them."""
    if form != NAMED or not isinstance(batch, ModelInputs):
        return arranged(model, batch, form)
    taken = {argument.name for argument in _arguments(model)}
    labels = {name: value for name, value in batch.named.items() if is_for_labels(name) and name in taken}
    own = arranged(model, batch, form)
    assert isinstance(own, ModelInputs), "what came by name goes by name"
    return ModelInputs(own.positional, own.named | labels)


def is_for_labels(name: str) -> bool:
    """Whether an argument or key of this name is for labels."""
    return any(word in name.lower() for word in LABELS)


def _by_name(model: nn.Module, batch: ModelInputs, arguments: list[inspect.Parameter]) -> ModelInputs:
    own = {a.name: a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
    takes_all = any(argument.kind == argument.VAR_KEYWORD for argument in arguments)
    found, left = {}, []
    for name, value in batch.named.items():
        is_label, is_needed = is_for_labels(name), name in own and own[name].default is inspect.Parameter.empty
        is_plain = value is None or isinstance(value, Tensor | bool | int | float)
        if is_needed or (not is_label and (name in own or (takes_all and is_plain))):
            found[name] = value
        elif not is_label:
            left.append(name)
    if not any(isinstance(value, Tensor) and value.ndim for value in found.values()):
        raise DataError(
            f"{type(model).__name__} takes {some(own) or 'nothing'}, and a batch has {some(batch.named)}: "
            f"name them as the network does; {REMEDY}"
        )
    masks = [name for name in left if "attention_mask" in name or "padding_mask" in name]
    if masks:
        message = f"{type(model).__name__} takes no {some(masks)}: the network treats padded positions as others"
        warnings.warn(message, TspcWarning, stacklevel=2)
    return ModelInputs((), found)


def _by_place(batch: ModelInputs, arguments: list[inspect.Parameter]) -> Given:
    first, *others = batch.positional
    places: list[Any] = [first]
    named: dict[str, Any] = {}
    for number, other in enumerate(others, start=1):
        argument = _taker(first, other, arguments[number : number + 1], arguments[1:])
        if argument is None:
            continue
        if argument.name in named or not _is_sure(argument, first, other):
            raise DataError(
                f"the tensor of shape {tuple(other.shape)} at place {number + 1} of a batch may be the network's "
                f"'{argument.name}', or labels: give a dict with the names of the arguments, or leave the labels out; "
                f"or {REMEDY}"
            )
        if argument.kind == argument.POSITIONAL_ONLY and len(places) == number:
            places.append(other)
        else:
            named[argument.name] = other
    taken = {argument.name for argument in arguments if not is_for_labels(argument.name)}
    named |= {name: value for name, value in batch.named.items() if name in taken}
    return ModelInputs(places, named) if named or len(places) > 1 else first


def _with_names(batch: ModelInputs, arguments: list[inspect.Parameter]) -> ModelInputs:
    """The same arguments; those behind the first one go by name where they have one, so that masks are known."""
    pairs = list(zip(batch.positional, arguments, strict=False))
    plain = [argument.kind == argument.POSITIONAL_OR_KEYWORD for _, argument in pairs]
    if len(pairs) < len(batch.positional) or not all(plain[1:]):
        return batch
    return ModelInputs(batch.positional[:1], {a.name: value for value, a in pairs[1:]} | batch.named)


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


def _taker(
    first: Tensor, other: Any, own: list[inspect.Parameter], arguments: list[inspect.Parameter]
) -> inspect.Parameter | None:
    """The argument that takes a further item of a batch; `own` has the argument at its place, if there is one."""
    if not isinstance(other, Tensor):
        return None
    for argument in own:
        is_plain = argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
        if is_plain and argument.default is argument.empty:
            return argument
        if is_plain and argument.default is None and _suits(argument, first, other):
            return argument
    # Found by name: masks are often passed by name, in any order.
    return next((mask for mask in _masks(arguments) if _suits(mask, first, other)), None)


def _masks(arguments: list[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    named = (a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY))
    return (argument for argument in named if "mask" in argument.name.lower())


def _is_sure(argument: inspect.Parameter, first: Tensor, other: Tensor) -> bool:
    """Whether a tensor that suits an argument is meant for it; labels may have the same shape."""
    name = argument.name.lower()
    if argument.default is argument.empty or other.dtype == torch.bool or other.ndim < 2:
        return True
    if other.is_floating_point() or other.shape != first.shape[:2]:
        return False
    if "mask" not in name:
        return any(word in name for word in ("type", "position", "ids"))
    steps = other.diff(dim=1)  # texts are padded on one side
    return bool((steps <= 0).all() or (steps >= 0).all())


def _suits(argument: inspect.Parameter, first: Tensor, other: Tensor) -> bool:
    """Whether a tensor can be the value of an optional argument."""
    name = argument.name.lower()
    if is_for_labels(name):
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
