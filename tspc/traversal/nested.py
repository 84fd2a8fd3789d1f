"""Values that contain tensors, as modules exchange them: nested tuples, dicts, dataclasses, caches."""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn

CONSTANTS = (
    *(bool, int, float, complex, str, bytes, range, slice, type, Enum, types.NoneType, types.EllipsisType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
    nn.Module,
)
"""Kinds of values that are not copied: no call changes them, or, for a module, the object itself is meant."""


class UnknownValueError(TypeError):
    """A value that cannot be copied: an iterator, a lock, an object with its state in C."""

    def __init__(self, value: object) -> None:
        self.kind = type(value).__name__
        super().__init__(f"a {self.kind} cannot be copied")


Leaf = type | tuple[type, ...]


def mapped(value: Any, change: Callable[[Any], Any], leaf: Leaf = Tensor) -> Any:
    """A copy of `value`, with `change` applied to every tensor (or other `leaf`).

    An object that occurs twice in `value` is copied once. Containers, their subclasses (namedtuples, transformers'
    ModelOutput) and plain objects (dataclasses, caches) are copied with their contents, and their constructors are not
    called. Raises UnknownValueError for other values.
    """
    return _Copier(change, leaf).copy(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Each tensor in `value` once; tensors inside values of unknown kinds are left out."""
    found: list[Tensor] = []
    _Copier(found.append, Tensor, is_strict=False).copy(value)
    return iter(found)


def equal(first: Any, second: Any) -> bool:
    """Whether two values without tensors have the same structure and the same constants; also objects without `==`."""
    return _equal(first, second, set())


def _equal(first: Any, second: Any, seen: set[tuple[int, int]]) -> bool:
    if first is second or (id(first), id(second)) in seen:
        return True
    if type(first) is not type(second):
        return False
    seen.add((id(first), id(second)))
    if isinstance(first, CONSTANTS):
        return bool(first == second)
    if isinstance(first, dict):
        items = list(first) == list(second) and all(_equal(first[key], second[key], seen) for key in first)
    elif isinstance(first, list | tuple | deque):
        pairs = zip(first, second, strict=False)
        items = len(first) == len(second) and all(_equal(one, other, seen) for one, other in pairs)
    elif _is_plain(type(first)):
        items = True
    else:
        return bool(first == second)
    own, other = dict(_attributes(first)), dict(_attributes(second))
    is_alike = own.keys() == other.keys() and all(_equal(own[name], other[name], seen) for name in own)
    return items and is_alike


class _Copier:
    def __init__(self, change: Callable[[Any], Any], leaf: Leaf, is_strict: bool = True) -> None:
        self._change, self._leaf, self._is_strict = change, leaf, is_strict
        self._done: dict[int, Any] = {}

    def copy(self, value: Any) -> Any:
        if isinstance(value, CONSTANTS) and not isinstance(value, self._leaf):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._change(value) if isinstance(value, self._leaf) else self._container(value)
        return self._done[id(value)]

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, tuple):
            made = self._tuple(value)
        elif isinstance(value, list | deque | dict):
            # Noted before it is filled, because it may contain itself.
            made = self._done[id(value)] = copy.copy(value)
            self._fill(made, value)
        elif isinstance(value, set | frozenset):
            made = kind(self.copy(item) for item in value)
        elif _is_plain(kind):
            made = self._done[id(value)] = object.__new__(kind)
        elif self._is_strict:
            raise UnknownValueError(value)
        else:
            return value
        for name, attribute in _attributes(value):
            object.__setattr__(made, name, self.copy(attribute))
        return made

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self.copy(item) for item in value]
        try:
            return tuple.__new__(type(value), items)
        except TypeError:  # results of torch.max and others are built by the type itself
            return cast("Callable[..., tuple[Any, ...]]", type(value))(items)

    def _fill(self, made: Any, value: Any) -> None:
        """Fills a container by the methods of the built-in types, because a subclass may do more than store."""
        if isinstance(value, dict):
            # An OrderedDict keeps its order separately.
            store = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__
            for key, item in list(value.items()):
                store(made, key, self.copy(item))
        else:
            for number, item in enumerate(list(value)):
                made[number] = self.copy(item)


def _is_plain(kind: type) -> bool:
    """Whether an object holds nothing besides its attributes."""
    own = ("__new__", "__reduce__", "__reduce_ex__")
    is_ours = all(getattr(kind, name) is getattr(object, name) for name in own) and not hasattr(kind, "__del__")
    return is_ours and kind.__module__ != "builtins" and bool(kind.__dictoffset__ or hasattr(kind, "__slots__"))


def _attributes(value: object) -> list[tuple[str, Any]]:
    slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    found = dict(getattr(value, "__dict__", {}))
    return [*found.items(), *((name, getattr(value, name)) for name in slots if hasattr(value, name))]
