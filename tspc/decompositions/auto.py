"""`auto`: the best of several methods, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tspc.decompositions.base import Decomposition
from tspc.decompositions.kernels import Shape
from tspc.errors import DecompositionError

CANDIDATES = ("svd", "cp", "tk", "tt", "rcp", "rtk", "rtt")
"""What `auto` chooses from where nothing else is said."""


@dataclass(frozen=True)
class Auto:
    """Leaves the choice between `members` to the plan, which takes the one with the least error for each layer."""

    members: tuple[Decomposition, ...]
    name: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        if not self.members:
            raise DecompositionError("method.candidates=[]: expected at least one method")

    def candidates(self, shape: Shape) -> tuple[Decomposition, ...]:
        """The decompositions to choose from for a kernel of this shape, each once."""
        return tuple(dict.fromkeys(member.for_shape(shape) for member in self.members))

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data; `decompositions.from_dict` reads it back."""
        plain = [member.to_dict() for member in self.members]
        return {"name": self.name, "candidates": plain}
