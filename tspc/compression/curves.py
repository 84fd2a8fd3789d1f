"""Curves of error against parameters, one for each layer and method, from a few decompositions."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from torch import Tensor, nn

from tspc import decompositions
from tspc.calibration.samples import Samples, moments_of
from tspc.compression.plan import LayerPlan
from tspc.decompositions import Decomposition, Method, Metric, Rank, Shape
from tspc.errors import DecompositionError
from tspc.layers.dense import DenseLayer, check_values, kernel_of
from tspc.system.modes import own_modes
from tspc.system.parallel import side_by_side
from tspc.traversal.hooks import evaluating

SHARES = (0.03, 0.08, 0.2, 0.5)
"""A curve is sampled at these sizes, relative to the dense kernel, and at the smallest rank."""
WIDE = 1024
"""With more inputs than this, the points of a curve are measured one after the other. Each takes the memory of several
second moments, and its products are large enough for all threads."""
LEAST = 1e-12
"""A smaller squared relative error counts as zero."""

Curves = Mapping[str, Sequence["ErrorCurve"]]
"""For each layer the curves of its candidate methods."""


@dataclass(frozen=True)
class ErrorCurve:
    """The squared relative output error of one layer under one method.

    The samples are `params` (entries of the factors, ascending) and `squared_errors`. `dense` is the number of entries
    of the kernel; there the error is zero. `weight` says how much the layer's error matters: the root mean square of
    the layer's part in the network's answer, or 1 if that is unknown.
    """

    method: Decomposition
    params: tuple[int, ...]
    squared_errors: tuple[float, ...]
    dense: int
    weight: float = 1.0

    def at(self, params: float) -> float:
        """The squared error at a size: logarithmic between samples, linear from the last one to the dense kernel."""
        if params <= self.params[0]:
            return self.squared_errors[0]
        if params >= self.params[-1]:
            left = (self.dense - params) / max(self.dense - self.params[-1], 1)
            return self.squared_errors[-1] * max(left, 0.0)
        i = bisect.bisect_right(self.params, params)
        (p, q), (a, b) = self.params[i - 1 : i + 1], self.squared_errors[i - 1 : i + 1]
        way = (params - p) / (q - p)
        return math.exp((1 - way) * math.log(max(a, LEAST)) + way * math.log(max(b, LEAST)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.to_dict(),
            "params": list(self.params),
            "errors": list(self.squared_errors),
            "dense": self.dense,
            "weight": self.weight,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ErrorCurve:
        """The inverse of `to_dict`. Raises ValueError for invalid points, ConfigError for an unknown method."""
        params, squared_errors = tuple(data["params"]), tuple(data["errors"])
        if not params or len(params) != len(squared_errors) or list(params) != sorted(set(params)):
            raise ValueError("the sizes of a curve ascend, and each has an error")
        method = decompositions.decomposition_from_dict(data["method"])
        return cls(method, params, squared_errors, data["dense"], data["weight"])


@own_modes()
def error_curves(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    method: Method,
    samples: Samples | None = None,
    *,
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, list[ErrorCurve]]:
    """For each layer that no rule keeps dense, a curve for every candidate method.

    With `samples` the error is that of the layer's output, else that of its kernel.

    Raises DecompositionError if any layer has a parameter with NaN or infinite values; the message names it.
    """
    curves: dict[str, list[ErrorCurve]] = {}
    waiting = {layer.name: layer for layer in layers if layer.reason is None}

    check_values(model)

    def measure(name: str, metric: Metric | None) -> None:
        weight = kernel_of(model.get_submodule(name)).detach()
        with naming(name):
            curves[name] = _curves(method.candidates(tuple(weight.shape)), weight, metric)
        waiting.pop(name)
        on_layer(name)

    if samples is not None:
        survey = samples.survey(model, list(waiting), [layer.name for layer in layers if layer.compensates])
        with evaluating(model):
            for name, moments in moments_of(model, list(waiting), samples, survey.trace):
                dense = cast(DenseLayer, model.get_submodule(name))
                metric = survey.statistics(name, dense, moments, samples).metric.sketch()
                del moments  # room for the fits
                measure(name, metric)
    for name in list(waiting):  # never called, or too wide: the kernel alone is used
        measure(name, None)
    return curves


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Adds the name of the layer to the message of a DecompositionError."""
    try:
        yield
    except DecompositionError as error:
        raise DecompositionError(f"layer {layer}: {error}") from error


def _curves(methods: Sequence[Decomposition], weight: Tensor, metric: Metric | None) -> list[ErrorCurve]:
    """One curve for each method."""
    shape, size = tuple(weight.shape), weight.numel()
    # Without a metric the kernel's own precision is enough.
    kernel = weight if metric is None else weight.to(metric.inputs)
    squared = (lambda matrix: float(matrix.square().sum())) if metric is None else metric.squared
    whole = squared(kernel.flatten(1))
    # `whole` is the layer's share in the squared change of the answer. It comes from a linear model, which is wrong
    # where errors are large. So the weight is the geometric mean of 1 and `whole`.
    importance = math.sqrt(whole) if metric is not None and metric.outputs is not None else 1.0

    def squared_error(point: tuple[Decomposition, Rank]) -> float:
        method, rank = point
        rebuilt = method.reconstruct(method.sketch().decompose(kernel, rank, metric))
        return squared((kernel - rebuilt).flatten(1)) / whole if whole > 0 else 0.0

    points = [(method, rank) for method in methods for rank in _sampled_ranks(method, shape)]
    if metric is not None and len(metric.inputs) > WIDE:
        found = {point: squared_error(point) for point in points}
    else:
        found = dict(side_by_side(squared_error, points, size=lambda point: point[0].num_params(shape, point[1])))
    curves = []
    for method in methods:
        own = {method.num_params(shape, rank): e for (m, rank), e in found.items() if m == method}
        params = sorted(own)
        falling = accumulate((own[p] for p in params), min)
        curves.append(ErrorCurve(method, tuple(params), tuple(falling), size, importance))
    return curves


def _sampled_ranks(method: Decomposition, shape: Shape) -> list[Rank]:
    """The smallest rank, and the largest rank within each of the SHARES, without duplicates of a size."""
    smallest, size = method.min_params(shape), math.prod(shape)
    ranks = [tuple(1 for _ in method.max_rank(shape))]
    ranks += [method.rank_for(shape, int(size * share)) for share in SHARES if size * share > smallest]
    return list({method.num_params(shape, rank): rank for rank in ranks}.values())
