"""Converts plain values to the types of a dataclass's fields."""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Union, get_args, get_origin

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Unfit(Exception):
    """A value of another type; the message says what is expected."""


def converted(value: Any, kind: Any) -> Any:
    """`value` as the type `kind`. A whole number may be written 1.0; a number or a truth value may be text.

    Raises Unfit for anything else.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _optional(value, kind)
    if origin is tuple:
        return _several(value, get_args(kind)[0])
    if origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise Unfit("a group of settings, as in {name: value}")
    return _PLAIN[kind](value)


def _optional(value: Any, kind: Any) -> Any:
    (inner,) = (member for member in get_args(kind) if member is not type(None))
    if value is None:
        return None
    try:
        return converted(value, inner)
    except Unfit as error:
        raise Unfit(f"{error}, or null") from None


def _several(value: Any, inner: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Unfit("a list, as in […]")
    try:
        return tuple(converted(item, inner) for item in value)
    except Unfit as error:
        raise Unfit(f"a list in which each item is {error}") from None


def _flag(value: Any) -> bool:
    if isinstance(value, str):
        value = WORDS.get(value.lower(), value)
    if isinstance(value, bool):
        return value
    raise Unfit("true or false")


def _whole(value: Any) -> int:
    number = _from_text(value, int)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    if isinstance(number, float) and number.is_integer():
        return int(number)
    raise Unfit("a whole number")


def _number(value: Any) -> float:
    number = _from_text(value, float)
    if isinstance(number, int | float) and not isinstance(number, bool):
        with suppress(OverflowError):
            return float(number)
    raise Unfit("a number")


def _from_text(value: Any, kind: type[int] | type[float]) -> Any:
    """A number from text, if it is one. Environment variables, for example, are text."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        return value


def _text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(ValueError):  # a number of thousands of digits
            value = str(value)
    if isinstance(value, str) and "\0" not in value:
        return value
    raise Unfit("a text")


def _path(value: Any) -> Path:
    if not (text := _text(value)).strip():
        raise Unfit("the name of a file or folder")
    return Path(text)


_PLAIN = {bool: _flag, int: _whole, float: _number, str: _text, Path: _path, Any: lambda value: value}
