"""How the arguments of a block follow from the call of the block before it.

A transformer block takes hidden states, which the block before it returned, and masks, position tables or a cache,
which the block before it took, too. So the blocks can be run one after the other from what is kept of each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tspc.traversal.hooks import version_of
from tspc.traversal.nested import CONSTANTS, UnknownValueError, equal, mapped, tensors_in

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments by position and by name."""
Key = int | str
"""An argument of a call: its place, or its name."""


@dataclass(frozen=True)
class _Place:
    """The place of a tensor: its number among those that a block returned, or was called with."""

    is_returned: bool
    number: int


@dataclass(frozen=True)
class _Same:
    """The argument of the block before, whatever it is: a mask, None where no input has padding, a cache it filled."""

    key: Key


@dataclass(frozen=True, eq=False)
class NextCall:
    """The arguments of a block's call; places stand for its tensors. Other values are constants."""

    call: Any

    @property
    def is_plain(self) -> bool:
        """Whether the only argument is the tensor that the block before it returned."""
        return equal(self.call, ((_Place(True, 0),), {}))

    def made(self, given: Sequence[Tensor], before: Call, output: Any) -> Call:
        """The call that follows the call `before` with the tensors `given`, which returned `output`."""
        returned, own = list(tensors_in(output)), dict(_arguments(before))

        def value(place: _Place | _Same) -> Any:
            if isinstance(place, _Same):
                return own[place.key]
            return (returned if place.is_returned else given)[place.number]

        return mapped(self.call, value, (_Place, _Same))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NextCall) and equal(self.call, other.call)


Noted = list[tuple[Tensor, int | None]]
"""Tensors with their versions. An operation in place keeps the object, but changes the version."""


def noted(value: Any) -> Noted:
    return [(tensor, version_of(tensor)) for tensor in tensors_in(value)]


def _arguments(call: Call) -> Iterator[tuple[Key, Any]]:
    yield from enumerate(call[0])
    yield from call[1].items()


@dataclass
class Handed:
    """What a block was called with, and what it returned.

    `call` has its arguments, and `after` their tensors when it returned: a block may fill a cache.
    """

    given: Noted = field(default_factory=list)
    returned: Noted = field(default_factory=list)
    call: Call = ((), {})
    after: dict[Key, Noted] = field(default_factory=dict)

    @classmethod
    def to(cls, call: Call) -> Handed:
        """A block's call, when it begins."""
        return cls(noted(call), call=call)

    def back(self, output: Any) -> None:
        """The block returns."""
        self.returned = noted(output)
        self.after = {key: noted(value) for key, value in _arguments(self.call)}

    def next_call(self, call: Call) -> NextCall | None:
        """The next block's call; None if one of its tensors is neither returned nor given here, or was changed."""
        places = {id(tensor): (_Place(False, i), version) for i, (tensor, version) in enumerate(self.given)}
        places |= {id(tensor): (_Place(True, i), version) for i, (tensor, version) in enumerate(self.returned)}
        own = dict(_arguments(self.call))
        returned = [_Place(True, i) for i in range(len(self.returned))]

        def place(tensor: Tensor) -> _Place:
            found, version = places[id(tensor)]
            if version is None or version != version_of(tensor):
                raise KeyError(id(tensor))
            return found

        def argument(key: Key, value: Any) -> Any:
            is_new = isinstance(value, Tensor) and places.get(id(value), (None, 0))[0] in returned
            is_same = not is_new and key in own and self._is_same(key, own[key], value)
            return _Same(key) if is_same else mapped(value, place)

        try:
            places_of = tuple(argument(key, value) for key, value in enumerate(call[0]))
            return NextCall((places_of, {key: argument(key, value) for key, value in call[1].items()}))
        except (KeyError, UnknownValueError):
            return None

    def _is_same(self, key: Key, before: Any, now: Any) -> bool:
        """Whether a block gets the argument of the block before, and nothing has changed it in between."""
        if isinstance(now, Tensor):
            return before is now and self._is_unchanged(now)
        if isinstance(now, CONSTANTS):
            return type(before) is type(now) and (before is now or before == now)
        # An object with tensors, such as a cache: the block itself may have filled it, but nothing since.
        kept = self.after.get(key, [])
        known = [(id(tensor), version) for tensor, version in kept]
        is_known = all(version is not None for _, version in known)
        return before is now and is_known and known == [(id(t), version_of(t)) for t in tensors_in(now)]

    def _is_unchanged(self, tensor: Tensor) -> bool:
        versions = [version for given, version in self.given if given is tensor]
        return bool(versions) and versions[0] is not None and versions[0] == version_of(tensor)
