"""How the arguments of a block follow from the call of the block before it.

A transformer block takes hidden states, which the block before it returned, and masks or position tables, which the
block before it took, too. So the blocks can be run one after the other from what is kept of each call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tspc.traversal.hooks import version_of
from tspc.traversal.nested import UnknownValueError, mapped, tensors_in

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments by position and by name."""


@dataclass(frozen=True)
class _Place:
    """The place of a tensor: its number among those that a block returned, or was called with."""

    is_returned: bool
    number: int


@dataclass(frozen=True)
class NextCall:
    """The arguments of a block's call; places stand for its tensors. Other values are constants."""

    call: Any

    @property
    def is_plain(self) -> bool:
        """Whether the only argument is the tensor that the block before it returned."""
        return self.call == ((_Place(True, 0),), {})

    def made(self, given: Sequence[Tensor], output: Any) -> Call:
        """The call that follows one with the tensors `given`, which returned `output`."""
        returned = list(tensors_in(output))
        return mapped(self.call, lambda place: (returned if place.is_returned else given)[place.number], _Place)


Noted = list[tuple[Tensor, int | None]]
"""Tensors with their versions. An operation in place keeps the object, but changes the version."""


def noted(value: Any) -> Noted:
    return [(tensor, version_of(tensor)) for tensor in tensors_in(value)]


@dataclass
class Handed:
    """What a block was called with, and what it returned."""

    given: Noted = field(default_factory=list)
    returned: Noted = field(default_factory=list)

    def next_call(self, call: Call) -> NextCall | None:
        """The next block's call; None if one of its tensors is neither returned nor given here, or was changed."""
        places = {id(tensor): (_Place(False, i), version) for i, (tensor, version) in enumerate(self.given)}
        places |= {id(tensor): (_Place(True, i), version) for i, (tensor, version) in enumerate(self.returned)}

        def place(tensor: Tensor) -> _Place:
            found, version = places[id(tensor)]
            if version is None or version != version_of(tensor):
                raise KeyError(id(tensor))
            return found

        try:
            return NextCall(mapped(call, place))
        except (KeyError, UnknownValueError):
            return None
