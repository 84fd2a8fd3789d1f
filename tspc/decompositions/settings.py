"""The allowed values of a method's settings."""

from __future__ import annotations

from typing import Any

from tspc.errors import DecompositionError
from tspc.system.bounds import Allowed, Bounds, described, shown

SWEEPS = Bounds(1, 1e6)
"""The allowed numbers of sweeps or starts of a fit."""


def require(method: Any, setting: str, allowed: Allowed, unit: str = "") -> None:
    """Raises DecompositionError if a setting of the method does not have an allowed value."""
    value = getattr(method, setting)
    if value not in allowed:
        raise DecompositionError(f"method.{setting}={shown(value)}: expected {described(allowed)} {unit}".rstrip())
