"""Curves of error against parameters, one for each layer and method, from a few decompositions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tspc.calibration.gathering import moments_of
from tspc.calibration.samples import Part, Samples, Survey
from tspc.calibration.sketches import sketches_of
from tspc.calibration.tables import heads_of, tables_of
from tspc.calibration.texts import is_encoder
from tspc.compression.curve_sizes import estimated_ranks, fitted_ranks, is_estimated, is_wide, middle_rank
from tspc.compression.error_curve import LEAST, ErrorCurve
from tspc.compression.form import DENSE, PLAIN, Widths, rank_for, rounding
from tspc.compression.plan import LayerPlan
from tspc.compression.spreading import over_processes
from tspc.decompositions import Decomposition, Method, Metric, Rank, Shape, double
from tspc.decompositions.function_space import spectra
from tspc.decompositions.linalg import Spectra
from tspc.errors import DecompositionError
from tspc.layers.dense import DenseLayer, check_values, kernel_of
from tspc.layers.unpacking import of_parts
from tspc.system.modes import own_modes
from tspc.system.parallel import side_by_side
from tspc.traversal.hooks import evaluating

FEW, NEAR = 2, 1.25
"""Of several methods, one whose squared error at the size COARSEST is more than NEAR times the least has FEW fits."""
WIDEST = 4096
"""With more inputs than this, a few rows are enough to show the curve."""
MOST = 1 - 1e-9
"""A larger squared relative error counts as 1."""


@own_modes()
@of_parts
def error_curves(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    method: Method,
    samples: Samples | None = None,
    *,
    widths: Widths = PLAIN,
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, list[ErrorCurve]]:
    """For each layer that no rule keeps dense, a curve for every candidate method.

    With `widths` below 32 bits the curves also tell what rounding adds to the error.

    With `samples` the error is that of the layer's output, else that of its kernel. Inside `processes.sharing` each
    process measures some of the layers, and all get all curves.

    Raises DecompositionError if any layer has a parameter with NaN or infinite values; the message names it.
    """
    curves: dict[str, Sequence[ErrorCurve]] = {}
    waiting = [layer for layer in layers if layer.reason is None]
    later = [layer.name for layer in layers if layer.compensates or layer in waiting]
    later += heads_of(model, [layer.name for layer in waiting if layer.is_table])
    called = [layer.name for layer in waiting if not layer.is_table]
    check_values(model)
    survey = None if samples is None else samples.survey(model, called, later)

    def keep(name: str, found: Sequence[ErrorCurve]) -> None:
        curves[name] = found
        on_layer(name)

    def some(names: list[str]) -> dict[str, list[dict[str, Any]]]:
        asked = [layer for layer in waiting if layer.name in names]
        for name, found in _measured(model, asked, (method, widths), samples, survey):
            keep(name, found)
        return {name: [curve.to_dict() for curve in curves[name]] for name in names}

    for name, plain in over_processes(waiting, survey, some).items():
        if name not in curves:
            keep(name, [ErrorCurve.from_dict(curve) for curve in plain])
    return {layer.name: list(curves[layer.name]) for layer in waiting}


def _measured(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    asked: tuple[Method, Widths],
    samples: Samples | None,
    survey: Survey | None,
) -> Iterator[tuple[str, list[ErrorCurve]]]:
    """The curves of some layers, one after the other."""
    method, widths = asked
    rows = {layer.name: layer for layer in layers}

    def measured(name: str, metric: Metric | None = None) -> list[ErrorCurve]:
        weight = kernel_of(model.get_submodule(name)).detach()
        with naming(name):
            curves = _curves(widths.methods(method, rows[name]), weight, metric, widths.bits, rows[name].is_table)
            return [replace(curve, weight=weighed(curve.weight)) for curve in curves]

    # A layer's share in the squared change of the answer comes from a linear model, wrong where errors are large. As
    # measured, the share is the better weight for encoders of texts; its root for images and language models.
    weighed = float if samples is not None and is_encoder(model, samples) else math.sqrt
    rest = dict.fromkeys(rows)
    if samples is not None and survey is not None:
        part = Part(samples)
        with evaluating(model):
            tables = [layer.name for layer in layers if layer.is_table]
            for name, sketch in tables_of(model, tables, samples, survey):
                found = measured(name, sketch.metric.sketch())
                if survey.weights(name) is None:  # without the sensitivity all layers weigh the same
                    found = [replace(curve, weight=1.0) for curve in found]
                yield name, found
                del rest[name]
            names = [name for name in rows if name not in tables]
            narrow = [name for name in names if kernel_of(model.get_submodule(name))[0].numel() <= WIDEST]
            for name, moments in moments_of(model, narrow, samples, survey.trace, part):
                dense = cast(DenseLayer, model.get_submodule(name))
                metric = survey.metric(name, dense, moments, part).sketch()
                del moments, rest[name]  # room for the fits
                yield name, measured(name, metric)
            wide = [name for name in rest if name not in tables]
            for name, sketch in sketches_of(model, wide, samples, survey, part):
                del rest[name]
                yield name, measured(name, sketch.metric.sketch())
    # Without samples, or never called: the kernel alone is used.
    yield from side_by_side(measured, list(rest), size=lambda name: kernel_of(model.get_submodule(name)).numel())


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Adds the name of the layer to the message of a DecompositionError."""
    try:
        yield
    except DecompositionError as error:
        raise DecompositionError(f"layer {layer}: {error}") from error


def _curves(
    candidates: Sequence[Decomposition],
    weight: Tensor,
    metric: Metric | None,
    widths: Sequence[int],
    is_table: bool,
) -> list[ErrorCurve]:
    """One curve for each method."""
    methods = [method for method in candidates if method != DENSE]
    # Without a metric the kernel's own precision is enough, but it is at least float32.
    own = torch.promote_types(weight.dtype, torch.float32)
    kernel = weight.to(own if metric is None else metric.inputs.dtype)
    squared = (lambda matrix: float(matrix.square().sum())) if metric is None else metric.squared
    whole = squared(kernel.flatten(1))
    importance = whole if metric is not None and metric.outputs is not None else 1.0

    def fitted(point: tuple[Decomposition, Rank]) -> float:
        method, rank = point
        rebuilt = method.reconstruct(method.sketch().decompose(kernel, rank, metric))
        return squared((kernel - rebuilt).flatten(1)) / whole if whole > 0 else 0.0

    shape, known = tuple(weight.shape), Spectra()
    estimates = {
        method: _estimate(method, kernel, metric, known) for method in methods if is_estimated(method, shape, metric)
    }
    points = {method: fitted_ranks(method, shape, metric) for method in methods}
    found: dict[tuple[Decomposition, Rank], float] = {}

    def measure() -> None:
        missing = [
            point for point in ((m, rank) for m, ranks in points.items() for rank in ranks) if point not in found
        ]
        if metric is not None and is_wide(metric):
            found.update({point: fitted(point) for point in missing})
        else:
            found.update(side_by_side(fitted, missing, size=lambda point: point[0].num_params(shape, point[1])))

    if len(methods) > 1 and max(map(len, points.values())) > FEW:
        # Several methods: first one fit for each, and more for those that come near to the best.
        wanted, middle = points, {method: middle_rank(method, shape) for method in methods}
        points = {m: list(dict.fromkeys((ranks[0], middle[m]))) if ranks else [] for m, ranks in wanted.items()}
        measure()
        at = {m: found[m, middle[m]] if ranks else estimates[m](middle[m]) for m, ranks in points.items()}
        good = min(at.values()) * NEAR
        points |= {method: ranks for method, ranks in wanted.items() if at[method] <= good}
    measure()
    curves = []
    for method in methods:
        errors = {method.num_params(shape, rank): found[method, rank] for rank in points[method]}
        if method in estimates:
            errors = _corrected(method, shape, estimates[method], errors)
        sizes = sorted(errors)
        falling = accumulate((errors[size] for size in sizes), min)
        added = rounding(method, kernel, metric, widths, squared)
        curves.append(ErrorCurve(method, tuple(sizes), tuple(falling), weight.numel(), importance, added))
    if DENSE in candidates:  # what a layer loses that is only rounded
        added = rounding(DENSE, kernel, metric, widths, squared, is_table)
        curves.append(ErrorCurve(DENSE, (weight.numel(),), (0.0,), weight.numel(), importance, added))
    return curves


def _estimate(method: Decomposition, kernel: Tensor, metric: Metric | None, known: Spectra) -> Callable[[Rank], float]:
    """The squared relative error at any rank, from what each entry of the rank cuts off.

    It takes the shares of the squared norm that the entries keep as independent. If the spectra are those of another
    method, its error is taken at the same size.
    """
    shape, source = tuple(kernel.shape), method.course() or method
    parts = [_cut_off(squares) for squares in spectra(source, kernel, metric, known)]

    def error(rank: Rank) -> float:
        if source != method:
            rank = rank_for(source, shape, max(method.num_params(shape, rank), source.min_params(shape)))
        return 1 - math.prod(1 - float(part[r]) for part, r in zip(parts, rank, strict=True))

    return error


def _cut_off(squares: Tensor) -> Tensor:
    """For every rank from 0 on, the share of the sum of squares beyond it."""
    wide = double(squares).cpu().flip(0)
    left = torch.cat([wide.new_zeros(1), wide.cumsum(0)]).flip(0)
    return left / left[0] if left[0] > 0 else left


def _corrected(
    method: Decomposition, shape: Shape, estimate: Callable[[Rank], float], measured: Mapping[int, float]
) -> dict[int, float]:
    """Size → error. The estimates are multiplied by measured ÷ estimated, interpolated between the measured sizes.

    The estimate at the smallest size is close, as hardly anything is kept there. What sweeps gain over a method's own
    start grows with the size, so there the correction is a power.
    """
    estimates = {method.num_params(shape, rank): estimate(rank) for rank in estimated_ranks(method, shape)}
    if not measured:
        return estimates
    if method.course() == method and not method.is_spectral and len(measured) == 1:
        ((size, error),) = measured.items()
        power = math.log(min(max(error, LEAST), MOST)) / math.log(min(max(estimates[size], LEAST), MOST))
        return {size: max(error, LEAST) ** power for size, error in estimates.items()}
    least = min(estimates)
    measured = {least: estimates[least], **measured}
    known = sorted(measured)
    ratios = [math.log(max(measured[size], LEAST) / max(estimates[size], LEAST)) for size in known]
    corrections = np.exp(np.interp(np.log(list(estimates)), np.log(known), ratios))
    return {
        size: min(1.0, error * float(factor))
        for (size, error), factor in zip(estimates.items(), corrections, strict=True)
    }
