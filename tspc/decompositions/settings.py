"""What the settings of a method may be."""

from __future__ import annotations

from typing import Any

from tspc.errors import DecompositionError
from tspc.system.bounds import Allowed, Bounds, described, shown

SWEEPS = Bounds(1, 1e6)
"""How many times a fit may be gone over or begun anew."""


def require(method: Any, setting: str, allowed: Allowed, unit: str = "") -> None:
    """Raises DecompositionError where a setting of the method is not one of those allowed."""
    value = getattr(method, setting)
    if value not in allowed:
        raise DecompositionError(f"method.{setting}={shown(value)}: expected {described(allowed)} {unit}".rstrip())
