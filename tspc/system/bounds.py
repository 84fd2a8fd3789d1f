"""Which numbers a setting may be, and how a wrong value is shown: short, whatever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tspc.errors import shortened

MANY = 10**9
"""No count of images, steps, bytes or seconds needs to be larger."""
LONGEST = 60
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Bounds:
    """The numbers from `low` to `high`; `above` leaves out `low` itself, `below` leaves out `high` itself.

    Neither NaN nor a truth value is in any bounds.
    """

    low: float
    high: float = MANY
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def of(self, noun: str) -> str:
        """As in "a number above 0 and at most 1"."""
        return f"{noun} {self}" if self.above else f"{noun} of {self}"

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:.10g}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:.10g}"


COUNT = Bounds(1)
"""How many, where there must be one."""
NONE_OR_MORE = Bounds(0)
SEEDS = Bounds(0, 2**31 - 1)
SHARE = Bounds(0, 1)
SHARE_BELOW_ONE = Bounds(0, 1, below=True)
POSITIVE_SHARE = Bounds(0, 1, above=True)


Allowed = Bounds | Sequence[str]
"""Numbers, or words."""


def described(allowed: Allowed) -> str:
    return str(allowed) if isinstance(allowed, Bounds) else f"one of {', '.join(allowed)}"


def out_of_range(settings: Any, where: str, allowed: Mapping[str, Allowed]) -> list[str]:
    """One line for each field of `settings` that is not one of those allowed; what is None is not looked at."""
    values = {field: getattr(settings, field) for field in allowed}
    return [
        f"{where}.{field}={shown(value)}: expected {described(allowed[field])}"
        for field, value in values.items()
        if value is not None and value not in allowed[field]
    ]


def shown(value: Any) -> str:
    """A setting's value as it is written on the command line, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = str(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python writes no whole number of thousands of digits
        text = f"a {type(value).__name__} of thousands of digits"
    return shortened(text, LONGEST)
