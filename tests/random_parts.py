"""The units and blocks of random networks, what their blocks exchange, and what they own beside layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Unit(nn.Module):
    """A layer, its norm and its activation; `use` says how the layer is used."""

    def __init__(self, layer: nn.Module, norm: nn.Module, activation: str, use: str) -> None:
        super().__init__()
        self.layer, self.norm, self.activation, self.use = layer, norm, activation, use
        weight = getattr(layer, "weight", None)
        if use == "two names":
            self.again = layer
        elif use == "never called":
            self.idle = nn.Linear(12, 9)
        elif use == "frozen":
            layer.requires_grad_(False)
        elif use == "frozen weight" and isinstance(weight, nn.Parameter):
            weight.requires_grad_(False)
        elif use == "tied weight" and isinstance(layer, nn.Linear) and isinstance(weight, nn.Parameter):
            self.twin = nn.Linear(layer.in_features, layer.out_features)
            self.twin.weight = weight
        elif use == "hook":
            layer.register_forward_hook(_halve)
        elif use == "pre-hook":
            layer.register_forward_pre_hook(_double)

    def forward(self, x: Tensor) -> Tensor:
        return acted(self.activation, self.norm(self._called(x)))

    def _called(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if self.use == "keyword" and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            return layer(input=x)
        if self.use == "checkpoint":
            return checkpoint(layer, x, use_reentrant=False)
        if self.use == "own weight" and isinstance(layer, nn.Linear):
            return F.linear(x, layer.weight, layer.bias)
        if self.use == "attributes":
            return self._read(x)
        y = layer(x)
        if self.use == "viewed":
            return y.view(len(y), -1).view(y.shape)
        if self.use in ("twice", "two names") and y.shape == x.shape:
            return self.again(y) if self.use == "two names" else layer(y)
        return y + self.twin(x) if hasattr(self, "twin") else y

    def _read(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        y = layer(x.to(next(layer.parameters()).dtype))
        if isinstance(layer, nn.Linear):
            assert x.shape[-1] == layer.in_features
            return y.reshape(*x.shape[:-1], layer.out_features)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            assert x.shape[1] == layer.in_channels
            assert len(layer.kernel_size) == len(layer.stride) == x.ndim - 2
            return y.reshape(len(x), layer.out_channels, *y.shape[2:])
        return y


def _halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def _double(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2, *args[1:])


def acted(activation: str, x: Tensor) -> Tensor:
    if activation == "relu in place":
        return F.relu(x, inplace=True) if not _is_leaf(x) else F.relu(x)
    if activation == "added in place" and not _is_leaf(x):
        x += 0.5
        return x
    return {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "detached": Tensor.detach}.get(activation, lambda x: x)(
        x
    )


def _is_leaf(x: Tensor) -> bool:
    return x.requires_grad and x.is_leaf


class State(NamedTuple):
    x: Tensor
    total: Tensor


@dataclass
class Record:
    x: Tensor
    total: Tensor


class Cache:
    """What blocks write to as they are called."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


Given = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def arguments(exchange: str, x: Tensor, total: Tensor, cache: Cache) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With what a block is called: x, a running total, or a cache."""
    given: Given = {
        "tensor": ((x,), {}),
        "tuple": (((x, total),), {}),
        "list": (([x, total],), {}),
        "dict": (({"x": x, "total": total},), {}),
        "namedtuple": ((State(x, total),), {}),
        "dataclass": ((Record(x, total),), {}),
        "two tensors": ((x, total), {}),
        "None": ((x, None), {}),
        "keyword": ((), {"x": x}),
        "number": ((x,), {"scale": 1.5}),
        "keyword tensor": ((x,), {"total": total}),
        "cache": ((x,), {"cache": cache}),
    }
    return given[exchange]


def unpacked(x: Any, total: Any) -> tuple[Tensor, Any]:
    if isinstance(x, dict):
        return x["x"], x["total"]
    if isinstance(x, Record | State):
        return x.x, x.total
    return (x[0], x[1]) if isinstance(x, tuple | list) else (x, total)


EXCHANGES = (
    "tensor", "tuple", "list", "dict", "namedtuple", "dataclass", "two tensors", "None", "keyword", "number",
    "keyword tensor", "cache",
)  # fmt: skip


class Block(nn.Module):
    """Units in a container; takes and gives what `exchange` says."""

    def __init__(self, units: list[nn.Module], container: str, residual: bool, exchange: str) -> None:
        super().__init__()
        self.residual, self.exchange, self.container = residual, exchange, container
        named = {f"unit_{i}": unit for i, unit in enumerate(units)}
        made: dict[str, Any] = {
            "sequential": lambda: nn.Sequential(*units),
            "list": lambda: nn.ModuleList(units),
            "dict": lambda: nn.ModuleDict(named),
            "nested": lambda: nn.ModuleList([nn.ModuleDict({"inner": nn.Sequential(unit)}) for unit in units]),
        }
        self.units = made[container]()

    def _each(self) -> Iterator[nn.Module]:
        inside: Iterable[Any] = self.units.values() if self.container == "dict" else self.units
        return (unit["inner"] if self.container == "nested" else unit for unit in inside)

    def forward(self, x: Any, total: Any = None, *, scale: float = 1.0, cache: Cache | None = None) -> Any:
        x, total = unpacked(x, total)
        y = x
        if self.container == "sequential":
            y = self.units(y)
        else:
            for unit in self._each():
                y = unit(y)
        y = y * scale
        if self.residual and y.shape == x.shape:
            y = y + x
        if cache is not None:
            cache.seen.append(y)
        total = total if total is None else total + y.float().mean()
        args, named = arguments(self.exchange, y, total, Cache())
        return args[0] if len(args) == 1 and not named else (args if len(args) == 2 else y)


class Stateful(nn.Module):
    """Extra state that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.known = {"steps": 3}

    def get_extra_state(self) -> Any:
        return dict(self.known)

    def set_extra_state(self, state: Any) -> None:
        self.known = dict(state)


EXTRAS: dict[str, Callable[[Any], Any]] = {
    "complex buffer": lambda model: model.register_buffer("waves", torch.randn(3, dtype=torch.complex64)),
    "whole numbers": lambda model: model.register_buffer("positions", torch.arange(5)),
    "float64 table": lambda model: model.register_buffer("table", torch.randn(5, dtype=torch.float64)),
    "buffer not saved": lambda model: model.register_buffer("passing", torch.ones(2), persistent=False),
    "scalar parameter": lambda model: setattr(model, "scale", nn.Parameter(torch.tensor(0.5))),
    "empty parameter": lambda model: setattr(model, "nothing", nn.Parameter(torch.empty(0))),
    "extra state": lambda model: setattr(model, "stateful", Stateful()),
    "lock": lambda model: setattr(model, "lock", threading.Lock()),
    "generator": lambda model: setattr(model, "generator", torch.Generator()),
    "lambda": lambda model: setattr(model, "rule", lambda x: x),
    "kept activation": lambda model: setattr(model, "keeps", True),
}
"""What a network may own beside layers, and how it gets it."""


def add_extra(model: nn.Module, extra: str) -> None:
    EXTRAS[extra](model)
