"""The decompositions of kernels: one file for each method, found by its name."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tspc.decompositions.auto import CANDIDATES, Auto
from tspc.decompositions.base import Decomposition
from tspc.decompositions.cp import CP
from tspc.decompositions.dense import Dense
from tspc.decompositions.interpolative import Interpolative
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, check_finite, double, is_matrix, kernel_dims
from tspc.decompositions.metric import Metric
from tspc.decompositions.registry import ENTRY_POINTS, KINDS, METHODS, register
from tspc.decompositions.reshaped import Reshaped
from tspc.decompositions.svd import SVD
from tspc.decompositions.tensor_ring import TensorRing
from tspc.decompositions.tensor_train import TensorTrain
from tspc.decompositions.tucker import Tucker
from tspc.errors import ConfigError
from tspc.system.bounds import shown

for _module in pkgutil.iter_modules(__path__):  # every method registers itself
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "CP",
    "METHODS",
    "SVD",
    "Auto",
    "Axes",
    "Decomposition",
    "Dense",
    "Factors",
    "Interpolative",
    "Method",
    "Metric",
    "Rank",
    "Reshaped",
    "Shape",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "check_finite",
    "decomposition_from_dict",
    "double",
    "from_dict",
    "is_known",
    "is_matrix",
    "kernel_dims",
    "names",
    "register",
    "resolve",
    "settings_of",
]

Method = Decomposition | Auto
"""A method of a plan: one decomposition for all layers, or `Auto`, which chooses one for each layer."""


def names() -> list[str]:
    """The names of all registered methods. A method of another package is registered when its name is first used."""
    return [*METHODS, Auto.name, Dense.name]


def settings_of(name: str) -> dict[str, Any]:
    """The settings that a method takes, with their defaults."""
    if name == Dense.name:
        return {}
    return {"candidates": list(CANDIDATES)} if name == Auto.name else METHODS.settings(name)


def from_dict(data: Mapping[str, Any]) -> Method:
    """The method described by plain data such as {"name": "rcp", "order": 2}.

    The candidates of `auto` are names, or such data.

    Raises ConfigError for an unknown name or setting; the message lists the known ones.
    """
    if data.get("name") != Auto.name:
        return decomposition_from_dict(data)
    candidates = data.get("candidates", CANDIDATES)
    if set(data) - {"name", "candidates"} or not isinstance(candidates, list | tuple):
        raise ConfigError([f"method={shown(dict(data))}: auto takes one setting, candidates=[NAME,…]"])
    members = [decomposition_from_dict(c if isinstance(c, Mapping) else {"name": c}) for c in candidates]
    return Auto(tuple(members))


def decomposition_from_dict(data: Mapping[str, Any]) -> Decomposition:
    """The decomposition described by plain data such as {"name": "rcp", "order": 2}.

    Raises ConfigError for an unknown name or setting; the message lists the known ones.
    """
    settings = dict(data)
    name = settings.pop("name", None)
    if not isinstance(name, str) or not is_known(name):
        raise ConfigError([_unknown(name)])
    known = settings_of(name)
    problems = [
        f"method.{shown(key)} is unknown for {name}; its settings are: {', '.join(known) or 'none'}"
        for key in settings
        if key not in known
    ]
    for key, value in settings.items():
        if key in known:
            kind = type(known[key])
            settings[key] = value = int(value) if _is_whole(value, kind) else value
            if not _is_of(value, kind):
                problems.append(f"method.{key}={shown(value)}: expected {KINDS[kind]}")
    if problems:
        raise ConfigError(problems)
    return Dense() if name == Dense.name else METHODS[name](**settings)


def is_known(name: str) -> bool:
    """Whether there is a decomposition of this name. Raises ConfigError if one of a package cannot be loaded."""
    return name == Dense.name or name in METHODS


def _unknown(name: Any) -> str:
    message = f"method {shown(repr(name))} is unknown; choose one of {', '.join(names())}"
    is_slip = not isinstance(name, str) or difflib.get_close_matches(name, names(), n=1)
    return message if is_slip else f"{message}; a package offers one by an entry point of the group {ENTRY_POINTS}"


def _is_whole(value: Any, kind: type) -> bool:
    """Whether the value of a whole-number setting is written as a float, such as 20.0."""
    return kind is int and isinstance(value, float) and value.is_integer()


def _is_of(value: Any, kind: type) -> bool:
    """Whether a value is of a setting's kind. A whole number is a number, too; a truth value is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def resolve(method: str | Method) -> Method:
    """The method of this name; a method is returned unchanged."""
    return from_dict({"name": method}) if isinstance(method, str) else method
