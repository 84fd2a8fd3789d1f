"""The state of a network in the form of a file: tensors by name, and everything else as JSON."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import WeightsError

_UNKNOWN = (torch.complex32, torch.complex128)
"""Dtypes that safetensors does not support."""


def tensor_state(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the state dict that are tensors; the results of `get_extra_state` may be none."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each further name of a parameter in the state its first name."""
    firsts: dict[int, str] = {}
    own = model.state_dict(keep_vars=True)
    named = {name: firsts.setdefault(id(x), name) for name, x in own.items() if isinstance(x, nn.Parameter)}
    return {name: first for name, first in named.items() if name != first}


def with_all_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state, in which each parameter and buffer that is there under one of its names is there under all."""
    own = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    values = {id(x): state[name] for name, x in own.items() if name in state}
    return {name: values[id(x)] for name, x in own.items() if id(x) in values} | dict(state)


def packed(model: nn.Module, once: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a network's state on the CPU, each with its own memory, and data for the header.

    The data is `extra`, the entries of the state dict that are not tensors, as JSON, and `buffers`, the dtypes of
    floating buffers that the state dict leaves out. Raises WeightsError for tensors without values or of kinds that
    safetensors does not support, and for extra state that only code could rebuild.

    With `once` a parameter with several names has the first one alone, and the data is also `tied`: see `tied_names`.
    """
    tied = tied_names(model) if once else {}
    extra: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        if isinstance(value, Tensor):
            found[name] = value
        else:
            extra[name] = _encoded(value, name, found)
    # Tied tensors share memory, which safetensors refuses, so each name gets its own copy.
    tensors = {name: _whole(name, value).detach().cpu().clone().contiguous() for name, value in found.items()}
    inside = {id(value) for value in model.state_dict(keep_vars=True).values()}
    left_out = {name: value for name, value in model.named_buffers() if id(value) not in inside}
    buffers = {name: _name_of(value.dtype) for name, value in left_out.items() if _is_inexact(value)}
    return tensors, {key: said for key, said in (("extra", extra), ("buffers", buffers), ("tied", tied)) if said}


def _whole(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise WeightsError(f"{name} has no values (it is on the meta device): give the network its weights first")
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.dtype in _UNKNOWN:
        kind = str(value.layout if value.layout != torch.strided else value.dtype).removeprefix("torch.")
        raise WeightsError(f"{name} is a tensor of kind {kind}, which safetensors cannot hold; make it a plain one")
    return value


def _is_inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Extra state as JSON; its tensors go into `tensors` under new names."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return {"float": str(value)}
    if isinstance(value, Tensor):
        key = f"{name}#{len(tensors)}"
        tensors[key] = value
        return {"tensor": key}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(item, name, tensors) for item in value]}
    if type(value) in (dict, OrderedDict):
        return {"dict": [[_encoded(part, name, tensors) for part in pair] for pair in value.items()]}
    raise WeightsError(
        f"{name} holds a {type(value).__name__}: of extra state only numbers, texts, tensors, and lists, tuples and "
        "dicts of them can be saved, because loading runs no code; let get_extra_state give these"
    )


def unpacked_extra(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The extra state that `packed` put into the header; takes its tensors out of `tensors`. Raises WeightsError."""
    try:
        return {str(name): _decoded(value, tensors) for name, value in header.get("extra", {}).items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise WeightsError("its header is damaged (extra state); fetch the file again, or make it again") from error


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors.pop(content)
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_decoded(item, tensors) for item in content)


@torch.no_grad()
def take_kinds_(model: nn.Module, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Gives parameters and buffers the dtypes of a file, and memory if they are on the meta device.

    Only entries of the file and the buffers that the header names are changed. Raises WeightsError, and changes
    nothing, if whole numbers would replace real ones or the reverse, and if the file has no values for a tensor on the
    meta device.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    wanted = [(own[name], value.dtype) for name, value in tensors.items() if name in own]
    wanted += _named_buffers(model, header)
    for name, value in tensors.items():
        if name in own and _is_inexact(own[name]) != _is_inexact(value):
            kinds = f"{_name_of(value.dtype)} instead of {_name_of(own[name].dtype)}"
            raise WeightsError(f"does not fit the network: {name} is {kinds}")
    _materialise_(model, tensors)
    for value, dtype in wanted:
        if value.dtype != dtype and not value.is_meta:
            value.data = value.data.to(dtype)
            value.grad = None


def _named_buffers(model: nn.Module, header: dict[str, Any]) -> list[tuple[Tensor, torch.dtype]]:
    named = header.get("buffers", {})
    found: list[tuple[Tensor, torch.dtype]] = []
    for name, value in model.named_buffers() if isinstance(named, dict) else ():
        dtype = getattr(torch, str(named.get(name)), None)
        if isinstance(dtype, torch.dtype) and _is_inexact(value):
            found.append((value, dtype))
    return found


def _materialise_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replaces parameters and buffers on the meta device; shared tensors stay shared."""
    made: dict[int, Tensor] = {}
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    lacking: list[str] = []
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is None or not value.is_meta:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if name in tensors:
                    made.setdefault(id(value), _with_memory(value, tensors[name].dtype))
                elif key == "num_batches_tracked":  # which older files lack
                    made.setdefault(id(value), torch.zeros((), dtype=value.dtype))
                else:
                    lacking.append(name)
                places.append((table, key, value))
        lacking += [
            f"{prefix}.{key}" if prefix else key
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and value.is_meta
        ]
    lacking = [name for name in lacking if name not in tensors]
    if lacking:
        raise WeightsError(
            f"has no values for {', '.join(lacking[:6])}, which the network has on the meta device; build the network "
            "with values, on the CPU"
        )
    for table, key, value in places:
        table[key] = made[id(value)]


def _with_memory(value: Tensor, dtype: torch.dtype) -> Tensor:
    memory = torch.empty(value.shape, dtype=dtype)
    return nn.Parameter(memory, value.requires_grad) if isinstance(value, nn.Parameter) else memory
