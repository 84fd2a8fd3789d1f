"""The allowed numbers of a setting, and the short form in which a message shows a wrong value."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tspc.errors import shortened

MANY = 10**9
"""The largest allowed count of images, steps, bytes or seconds."""
LONGEST = 60
"""The largest number of characters of a value in a message."""


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
"""A count that must be at least one."""
NONE_OR_MORE = Bounds(0)
SEEDS = Bounds(0, 2**31 - 1)
SHARE = Bounds(0, 1)
SHARE_BELOW_ONE = Bounds(0, 1, below=True)
POSITIVE_SHARE = Bounds(0, 1, above=True)


Allowed = Bounds | Sequence[str]
"""Numbers, or words."""


def described(allowed: Allowed, noun: str = "") -> str:
    if not isinstance(allowed, Bounds):
        return f"one of {', '.join(allowed)}"
    return allowed.of(noun) if noun else str(allowed)


def out_of_range(settings: Any, where: str, allowed: Mapping[str, Allowed]) -> list[str]:
    """One line for each field of a dataclass with a value that is not allowed; None is allowed if its type says so.

    Truth values need no entry in `allowed`. `where` is the group of the settings, empty at the top level.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(settings)}
    prefix = f"{where}." if where else ""
    flags = {name: getattr(settings, name) for name, kind in kinds.items() if kind == "bool"}
    found = [
        f"{prefix}{name}={shown(value)}: expected true or false"
        for name, value in flags.items()
        if not isinstance(value, bool)
    ]
    for name, options in allowed.items():
        value, kind = getattr(settings, name), kinds[name]
        if value is None and "None" in kind:
            continue
        is_broken = kind.startswith("int") and not isinstance(value, int)
        if is_broken or isinstance(value, list | dict) or value not in options:
            noun = {"int": "a whole number", "float": "a number"}.get(kind.partition(" ")[0], "")
            found.append(f"{prefix}{name}={shown(value)}: expected {described(options, noun)}")
    return found


def unknown(given: Iterable[Any], names: Iterable[str], where: str = "") -> list[str]:
    """One line for each key of `given` that is not one of the names; it suggests the nearest name."""
    known, found = list(names), []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known are: {', '.join(known) or 'none'}"
            found.append(f"{where}{shown(key)} is not a setting; {hint}")
    return found


def shown(value: Any) -> str:
    """A setting's value as it is written on the command line; a long one is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < MANY:
        value = int(value)
    try:
        text = str(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python writes no whole number of thousands of digits
        text = f"a {type(value).__name__} of thousands of digits"
    return shortened(text, LONGEST)
