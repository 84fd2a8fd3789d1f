"""The seven decompositions and their registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tspc.decompositions.auto import Auto
from tspc.decompositions.base import Decomposition, Factors, Rank, Shape, check_finite, double, is_matrix, kernel_dims
from tspc.decompositions.cp import CP
from tspc.decompositions.function_space import Metric
from tspc.decompositions.reshaped import Reshaped
from tspc.decompositions.svd import SVD
from tspc.decompositions.tensor_train import TensorTrain
from tspc.decompositions.tucker import Tucker
from tspc.errors import ConfigError
from tspc.system.bounds import shown

__all__ = [
    "CP",
    "METHODS",
    "NAMES",
    "Auto",
    "SVD",
    "Decomposition",
    "Factors",
    "Method",
    "Metric",
    "Rank",
    "Reshaped",
    "Shape",
    "TensorTrain",
    "Tucker",
    "check_finite",
    "decomposition_from_dict",
    "double",
    "from_dict",
    "is_matrix",
    "kernel_dims",
    "resolve",
]


_FORMS: dict[str, tuple[type[CP | Tucker | TensorTrain], dict[str, Any]]] = {
    "rcp": (CP, {"order": 2}),
    # Twice as many bases wait for each other: its sweeps converge more slowly.
    "rtk": (Tucker, {"order": 2, "tolerance": 2e-4}),
    "rtt": (TensorTrain, {"order": 3}),
}
"""The reshaped methods: what they apply to the reshaped kernel, and their own default settings."""

_PLAIN: dict[str, type[Decomposition]] = {"svd": SVD, "cp": CP, "tk": Tucker, "tt": TensorTrain}


def _reshaped(inner: type[CP | Tucker | TensorTrain], defaults: dict[str, Any]) -> Callable[..., Reshaped]:
    def build(**settings: Any) -> Reshaped:
        given = defaults | settings
        return Reshaped(inner(**{k: v for k, v in given.items() if k != "order"}), given["order"])

    return build


METHODS: dict[str, Callable[..., Decomposition]] = {
    **_PLAIN,
    **{name: _reshaped(inner, defaults) for name, (inner, defaults) in _FORMS.items()},
}
"""Name → constructor, whose keyword arguments are the method's settings."""


Method = Decomposition | Auto
"""What a plan is made for: one decomposition for all layers, or the best of several for each."""

NAMES = (*METHODS, Auto.name)


def settings_of(name: str) -> dict[str, Any]:
    """The settings that a method takes, with their defaults."""
    if name == Auto.name:
        return {"candidates": list(METHODS)}
    cls, own = _FORMS.get(name) or (_PLAIN[name], {})
    return {f.name: f.default for f in dataclasses.fields(cls)} | own


def from_dict(data: Mapping[str, Any]) -> Method:
    """The method described by plain data such as {"name": "rcp", "order": 2}.

    The candidates of `auto` are names, or such descriptions.

    Raises ConfigError for an unknown name or setting; the message lists those that exist.
    """
    if data.get("name") != Auto.name:
        return decomposition_from_dict(data)
    candidates = data.get("candidates", list(METHODS))
    if set(data) - {"name", "candidates"} or not isinstance(candidates, list | tuple):
        raise ConfigError([f"method={shown(dict(data))}: auto takes one setting, candidates=[NAME,…]"])
    members = [decomposition_from_dict(c if isinstance(c, Mapping) else {"name": c}) for c in candidates]
    return Auto(tuple(members))


def decomposition_from_dict(data: Mapping[str, Any]) -> Decomposition:
    """The decomposition described by plain data such as {"name": "rcp", "order": 2}.

    Raises ConfigError for an unknown name or setting; the message lists those that exist.
    """
    settings = dict(data)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError([f"method {shown(repr(name))} is unknown; choose one of {', '.join(NAMES)}"])
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
            if isinstance(value, bool) or not isinstance(value, kind | int if kind is float else kind):
                problems.append(f"method.{key}={shown(value)}: expected {_KINDS[kind]}")
    if problems:
        raise ConfigError(problems)
    return METHODS[name](**settings)


_KINDS = {int: "a whole number", float: "a number", str: "a text"}


def _is_whole(value: Any, kind: type) -> bool:
    """Whether a setting that counts is written as 20.0."""
    return kind is int and isinstance(value, float) and value.is_integer()


def resolve(method: str | Method) -> Method:
    """A method from its name, or itself."""
    return from_dict({"name": method}) if isinstance(method, str) else method
