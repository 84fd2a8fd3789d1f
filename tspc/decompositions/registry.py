"""The methods by name. A decorator registers a class; a YAML file cannot.

A method of another package is found by an entry point of the group `tspc.methods`. The entry point has the name of the
method, and its value is the class:

    [project.entry-points."tspc.methods"]
    mine = "package.module:Mine"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from tspc.errors import ConfigError

if TYPE_CHECKING:
    from tspc.decompositions.base import Decomposition

AUTO = "auto"
"""The name that leaves the choice to the plan."""
DENSE = "dense"
"""The name of a kernel that stays whole."""
ENTRY_POINTS = "tspc.methods"
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
"""The kinds of settings; the kind of a setting is that of its default."""

Method = TypeVar("Method", bound="type[Decomposition]")


class Registry(Mapping[str, "Callable[..., Decomposition]"]):
    """Name → constructor. Its keyword arguments are the settings. In alphabetical order, reshaped methods last."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Callable[..., Decomposition], dict[str, Any]]] = {}

    def add(self, name: str, build: Callable[..., Decomposition], settings: dict[str, Any]) -> None:
        """Registers a constructor. Raises ConfigError if another class has the name."""
        if name in (AUTO, DENSE) or (name in self._made and self._made[name][0] is not build):
            raise ConfigError([f"a method called {name!r} is registered already; give yours another name"])
        self._made[name] = build, settings

    def settings(self, name: str) -> dict[str, Any]:
        """The settings that a method takes, with their defaults. Raises KeyError for an unknown name."""
        self[name]
        return self._made[name][1]

    def __getitem__(self, name: str) -> Callable[..., Decomposition]:
        if name not in self._made:
            self._find(name)
        return self._made[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._made, key=lambda name: ("order" in self._made[name][1], name)))

    def __len__(self) -> int:
        return len(self._made)

    def _find(self, name: str) -> None:
        """Imports the class that an installed package offers under this name, if there is one."""
        for found in entry_points(group=ENTRY_POINTS, name=name):
            try:
                method = found.load()
                if (own := method.name) == name:
                    register()(method)
            except Exception as error:  # the code of another package
                raise ConfigError([f"method {name!r} of {found.value} cannot be loaded: {error}"]) from error
            if name not in self._made:  # a reshaped method is registered when its file is loaded
                raise ConfigError(
                    [f"the entry point {name!r} gives {found.value}, whose name is {own!r}; make both names equal"]
                )


METHODS = Registry()


def register(reshaped: Mapping[str, Any] | None = None) -> Callable[[Method], Method]:
    """A decorator that registers a decomposition under its `name`. Its fields are its settings.

    Each setting has a default, which is a whole number, a number, a text or a truth value. The decorator raises
    ConfigError for any other field.

    With `reshaped` a `Formatted` method is also registered as `r<name>`: the method on a kernel with split channels.
    `reshaped` holds the defaults that differ for `r<name>`, and `order`, the number of modes into which the channels
    are split.
    """

    def add(method: Method) -> Method:
        defaults = _defaults(method)
        METHODS.add(method.name, method, defaults)
        if reshaped is not None:
            METHODS.add(f"r{method.name}", *_reshaped(method, {**defaults, **reshaped}))
        return method

    return add


def _defaults(method: Any) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    expected = "a setting has a default that is a whole number, a number, a text or a truth value"
    wrong = [key for key, default in defaults.items() if type(default) not in KINDS]
    if wrong:
        raise ConfigError([f"method.{key} of {method.name}: {expected}" for key in wrong])
    return defaults


def _reshaped(method: Any, defaults: dict[str, Any]) -> tuple[Callable[..., Decomposition], dict[str, Any]]:
    def build(**settings: Any) -> Decomposition:
        from tspc.decompositions.reshaped import Reshaped

        given = defaults | settings
        return Reshaped(method(**{key: value for key, value in given.items() if key != "order"}), given["order"])

    return build, defaults
