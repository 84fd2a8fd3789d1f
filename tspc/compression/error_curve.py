"""A curve of error against parameters, of one layer under one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tspc import decompositions
from tspc.decompositions import Decomposition

LEAST = 1e-12
"""A smaller squared relative error counts as zero."""

Curves = Mapping[str, Sequence["ErrorCurve"]]
"""For each layer the curves of its candidate methods."""


@dataclass(frozen=True)
class ErrorCurve:
    """The squared relative output error of one layer under one method.

    The samples are `params` (entries of the factors, ascending) and `squared_errors`. `dense` is the number of entries
    of the kernel; there the error is zero. `weight` says how much the layer's error matters: the layer's part in the
    squared change of the network's answer (for images and language models its root), or 1 if that is unknown.
    `rounding` has, for widths in bits, the share of the squared output that rounding the factors adds to the error.
    """

    method: Decomposition
    params: tuple[int, ...]
    squared_errors: tuple[float, ...]
    dense: int
    weight: float = 1.0
    rounding: tuple[tuple[int, float], ...] = ()

    def rounding_at(self, bits: int) -> float:
        """The squared relative error that factors of this width add; 0 if it was not measured."""
        return dict(self.rounding).get(bits, 0.0)

    def at(self, params: float) -> float:
        """The squared error at a size."""
        return float(self.on(np.array([params]))[0])

    def on(self, params: np.ndarray) -> np.ndarray:
        """The squared errors at sizes: logarithmic between samples, linear from the last one to the dense kernel."""
        (first, *_, last), errors = (self.params[0], *self.params), np.array(self.squared_errors)
        left = (self.dense - params) / max(self.dense - last, 1)
        inner = np.exp(np.interp(params, self.params, np.log(np.maximum(errors, LEAST))))
        beyond = np.where(params >= last, errors[-1] * np.maximum(left, 0.0), inner)
        return np.where(params <= first, errors[0], beyond)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.to_dict(),
            "params": list(self.params),
            "errors": list(self.squared_errors),
            "dense": self.dense,
            "weight": self.weight,
            "rounding": [list(pair) for pair in self.rounding],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ErrorCurve:
        """The inverse of `to_dict`. Raises ValueError for invalid points, ConfigError for an unknown method."""
        params, squared_errors = tuple(data["params"]), tuple(data["errors"])
        if not params or len(params) != len(squared_errors) or list(params) != sorted(set(params)):
            raise ValueError("the sizes of a curve ascend, and each has an error")
        method = decompositions.decomposition_from_dict(data["method"])
        rounding = tuple((bits, error) for bits, error in data.get("rounding", ()))
        return cls(method, params, squared_errors, data["dense"], data["weight"], rounding)
