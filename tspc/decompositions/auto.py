"""`auto`: the best of several methods for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tspc.decompositions.base import Decomposition
from tspc.decompositions.kernels import Shape
from tspc.errors import DecompositionError

CANDIDATES = ("svd", "cp", "tk", "tt", "rcp", "rtk", "rtt")
"""The default candidates of `auto`."""


@dataclass(frozen=True)
class Auto:
    """Several methods, `members`; the plan chooses the one with the least error for each layer."""

    members: tuple[Decomposition, ...]
    name: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        if not self.members:
            raise DecompositionError("method.candidates=[]: expected at least one method")

    def candidates(self, shape: Shape) -> tuple[Decomposition, ...]:
        """The candidates for a kernel of this shape, without duplicates."""
        return tuple(dict.fromkeys(member.for_shape(shape) for member in self.members))

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data; `decompositions.from_dict` reads it back."""
        plain = [member.to_dict() for member in self.members]
        return {"name": self.name, "candidates": plain}
