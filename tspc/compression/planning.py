"""Rate → ranks over the whole network, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from tspc.calibration.samples import Calibration, Samples, kept
from tspc.compression.allocation import Candidate, overall, uniform, without_slower
from tspc.compression.curves import Curves, error_curves
from tspc.compression.outline import Outline, outline
from tspc.compression.path_costs import Costs, input_sizes
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.selection import FilterFn
from tspc.compression.settings import PlanSettings
from tspc.decompositions import Method
from tspc.errors import ConfigError
from tspc.system.modes import own_modes
from tspc.traversal.blocks import block_of, find_blocks

RATE_STEPS = 24
"""Bisections of the rate that meets a target error."""


@own_modes()
def plan(
    model: nn.Module,
    method: str | Method | PlanSettings = "tt",
    rate: float | None = None,
    *,
    calibration: Tensor | Iterable[Any] | Samples | None = None,
    settings: Calibration | None = None,
    filter_fn: FilterFn | None = None,
    example: Tensor | None = None,
    curves: Curves | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> Plan:
    """Chooses the ranks of every layer of `model`; changes nothing.

    What is asked for is a `PlanSettings` in the place of the method; or a method by its name or itself, a `rate` (0.2
    where no goal is given), and `options`, which are the fields of `PlanSettings` and of its `Selection`.
    `filter_fn`, a predicate (name, module) -> bool, keeps those layers dense for which it is false.

    Errors are those of the layers' outputs over the `calibration` data, without it of the kernels. The data is a tensor
    of images (N, …), or gives batches of them, with or without labels, like a DataLoader; its `settings` say how it is
    used. Or it is `Samples`, which are kept for several calls. `curves`, where given, are not measured again.
    `example` (images; by default one of the samples) shows the sizes of the layers' inputs, by which the paths are
    chosen. `on_layer` is told the name of each layer whose errors were measured.

    Raises ConfigError for a wrong argument or a network with nothing to tensorize, InfeasibleRateError if
    the rate cannot be met; the latter names the smallest rate that can.
    """
    asked = PlanSettings.of(method, rate, **options)
    sketch = outline(model, asked, filter_fn)
    if asked.target_error is None:
        sketch.budget(asked.rate)  # a rate that cannot be met is refused before the work
    with kept(calibration, settings, model) as samples:
        if curves is None and asked.needs_curves:
            curves = error_curves(model, sketch.layers, asked.method, samples, on_layer=on_layer)
        if example is None and samples is not None:
            example = next(iter(samples))[:1]
    return planned(model, sketch, curves, example)


@own_modes()
def planned(model: nn.Module, sketch: Outline, curves: Curves | None, example: Tensor | None) -> Plan:
    """The ranks of an outline's layers, from their error curves, and the paths for inputs as large as the `example`.

    Raises InfeasibleRateError if the rate cannot be met, ConfigError if the target error cannot.
    """
    asked = sketch.settings
    sizes = {} if example is None else input_sizes(model, [layer.name for layer in sketch.chosen], example)
    costs, candidates = Costs(asked.paths, asked.objective, sizes), sketch.candidates(curves)
    names = [layer.name for layer in sketch.chosen]
    weights = dict(zip(names, _weights(model, sketch.chosen, asked.rate_decay), strict=True))

    def share_out(those: Sequence[Candidate], budget: int) -> list[LayerPlan]:
        share = [weights[c.layer.name] for c in those]
        ranked = overall(those, budget) if asked.allocation == "global" else uniform(those, share, budget)
        return [costs.best(model.get_submodule(row.name), row) for row in ranked]

    def at(rate: float) -> Plan:
        budget = sketch.budget(rate)
        ranked = share_out(candidates, budget)
        if asked.objective != "parameters":
            is_slow = lambda row: not costs.is_faster(model.get_submodule(row.name), row)  # noqa: E731
            ranked = without_slower(candidates, budget, ranked, share_out, is_slow)
        by_name = {layer.name: layer for layer in ranked}
        final = tuple(by_name.get(layer.name, layer) for layer in sketch.layers)
        settled = asked.method, rate, asked.rate_decay, asked.rate_scope, asked.allocation
        return Plan(*settled, final, sketch.network_params, asked.objective)

    if asked.target_error is None:
        return at(asked.rate)
    return _smallest_plan(at, sketch.smallest_rate, asked.target_error)


def _weights(model: nn.Module, layers: list[LayerPlan], rate_decay: str) -> list[float]:
    """Relative rate of each layer: 1 for all, or the number of its block counted from either end."""
    if rate_decay == "flat":
        return [1.0] * len(layers)
    blocks = find_blocks(model, [layer.name for layer in layers])
    depths = [block_of(layer.name, blocks) or 0 for layer in layers]
    return [float(d + 1 if rate_decay == "linear_inc" else len(blocks) - d) for d in depths]


def _smallest_plan(at: Callable[[float], Plan], low: float, target_error: float) -> Plan:
    """The plan with the smallest rate, from `low` on, whose expected error is at most the target."""
    best, high = at(1.0), 1.0
    if _expected(best) > target_error:
        least = _expected(best)
        message = f"target_error={target_error} cannot be met: at rate 1 it is {least:.4g}; allocation=global can"
        raise ConfigError([message])
    if _expected(smallest := at(low)) <= target_error:
        return smallest
    for _ in range(RATE_STEPS):
        middle = (low + high) / 2
        tried = at(middle)
        if _expected(tried) <= target_error:
            best, high = tried, middle
        else:
            low = middle
    return best


def _expected(plan: Plan) -> float:
    assert plan.output_error is not None, "a target error needs curves"
    return plan.output_error
