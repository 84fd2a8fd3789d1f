"""Chooses the ranks of all layers for a rate or an error, before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tspc.calibration.samples import Calibration, Samples, kept
from tspc.compression.allocation import Candidate, overall, uniform, without_slower
from tspc.compression.curves import error_curves
from tspc.compression.error_curve import Curves
from tspc.compression.form import DENSE, Widths
from tspc.compression.outline import Outline, outline
from tspc.compression.path_costs import Costs, input_sizes
from tspc.compression.plan import SLOWER, LayerPlan, Plan
from tspc.compression.selection import FilterFn
from tspc.compression.settings import PlanSettings
from tspc.compression.time_plans import Timekeeper, needs_example, timekeeper
from tspc.data.arranging import inputs_of
from tspc.data.model_inputs import Given
from tspc.decompositions import Method
from tspc.errors import ConfigError, TspcWarning, UntimedError
from tspc.layers.unpacking import of_parts
from tspc.quantization.grids import FULL
from tspc.system import processes
from tspc.system.modes import own_modes
from tspc.traversal.blocks import block_of, find_blocks

RATE_STEPS = 24
"""The number of bisections that search for the rate of a target error."""


@own_modes()
@of_parts
def plan(
    model: nn.Module,
    method: str | Method | PlanSettings = "tt",
    rate: float | None = None,
    *,
    calibration: Given | Iterable[Any] | Samples | None = None,
    settings: Calibration | None = None,
    filter_fn: FilterFn | None = None,
    example: Given | Mapping[str, Any] | None = None,
    curves: Curves | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
    spread: bool = False,
    **options: Any,
) -> Plan:
    """Chooses the ranks of every layer of `model`; changes nothing.

    `method` is a method, its name, or a `PlanSettings` with all settings. `rate` is the share of parameters that may be
    left (0.2 if no goal is given). `options` are fields of `PlanSettings`, of its `Selection` and of its `Terms`.
    `filter_fn(name, module)` chooses layers: a layer stays dense if it returns False.

    With `calibration` data the errors are those of the layers' outputs, else those of the kernels. The data is a batch
    or an iterable of batches, such as a DataLoader; `settings` say how it is used. A batch is what the network takes: a
    tensor (N, …), a tuple of tensors, a dict of them by name, `ModelInputs`; labels are left out. Positions that an
    attention mask calls padded do not count, and texts may have any lengths. Or the data is `Samples`, which serve
    several calls. If `curves` are given, the errors are not measured again.
    `example` (inputs; by default one of the samples) shows the sizes of the layers' inputs. They decide which path is
    the cheapest. `on_layer` is called with the name of each layer after its errors were measured. With `spread` all
    processes of `torch.distributed` call this together and share the layers; see `compress`.

    A limit on the time (`latency`, `speedup`) and `objective=latency` need such an input, too: networks are timed in
    the runtime.

    Raises ConfigError for a wrong argument or a network with nothing to tensorize. Raises InfeasibleRateError if the
    rate cannot be met, InfeasibleTimeError if the limit on the time cannot; the error names the nearest possible one.
    """
    asked = PlanSettings.of(method, rate, **options)
    if asked.is_timed and example is None and calibration is None:
        raise ConfigError([needs_example(asked)])
    if asked.max_drop is not None:
        remedy = "call tspc.compress or tspc.smallest, with held_out="
        raise ConfigError([f"max_drop={asked.max_drop:g} is found by trying networks, not by a plan: {remedy}"])
    sketch = outline(model, asked, filter_fn)
    if asked.target_error is None:
        sketch.budget(sketch.rate)  # raises the error before the work if the rate cannot be met
    with processes.sharing(spread), kept(calibration, settings, model) as samples:
        if curves is None and asked.needs_curves:
            curves = error_curves(model, sketch.layers, asked.method, samples, widths=asked.widths, on_layer=on_layer)
        example = shown_by(model, samples, example)
        if processes.is_shared():  # the times that `paths` may measure differ from process to process
            return Plan.from_dict(processes.by_first(lambda: planned(model, sketch, curves, example).to_dict()))
    return planned(model, sketch, curves, example)


def shown_by(model: nn.Module, samples: Samples | None, example: Given | Mapping[str, Any] | None) -> Given | None:
    """The example as the network takes it; without one, one of the samples."""
    if example is not None:
        return inputs_of(model, example)
    return None if samples is None else samples.example(model)


@own_modes()
@of_parts
def planned(
    model: nn.Module,
    sketch: Outline,
    curves: Curves | None,
    example: Given | None,
    known: Timekeeper | None = None,
) -> Plan:
    """The ranks of an outline's layers, from their error curves, and the paths for inputs of the `example`'s size.

    With a limit on the time, or `objective=latency`, layers and whole networks are timed in the runtime; see
    `tspc.compression.time_plans`. What is `known` of the network's times serves several plans.

    Raises InfeasibleRateError if the rate cannot be met, InfeasibleTimeError if the limit on the time cannot,
    ConfigError if the target error cannot.
    """
    keeper = keeper_for(model, sketch, example) if known is None else known.for_settings(sketch.settings)
    try:
        return _planned(model, sketch, curves, example, keeper)
    except UntimedError as error:
        if sketch.settings.is_timed:
            raise
        warnings.warn(f"objective=latency goes by the cost model: {error}", TspcWarning, stacklevel=2)
        return _planned(model, sketch, curves, example, None)


@of_parts
def keeper_for(model: nn.Module, sketch: Outline, example: Given | None) -> Timekeeper | None:
    """What knows the times of an outline's layers; None if its settings need no times. Raises ConfigError."""
    return timekeeper(model, sketch.settings, [layer.name for layer in sketch.chosen], example)


def _planned(
    model: nn.Module, sketch: Outline, curves: Curves | None, example: Given | None, keeper: Timekeeper | None
) -> Plan:
    asked, names = sketch.settings, [layer.name for layer in sketch.chosen]
    if keeper is None:
        sizes = {} if example is None else input_sizes(model, names, example)
        costs = Costs(asked.paths, asked.objective, sizes, asked.runtime)
    else:
        costs = keeper.costs
    candidates = sketch.candidates(curves)
    weights = dict(zip(names, _weights(model, sketch.chosen, asked.rate_decay), strict=True))

    def share_out(those: Sequence[Candidate], budget: int) -> list[LayerPlan]:
        share = [weights[c.layer.name] for c in those]
        ranked = overall(those, budget) if asked.allocation == "global" else uniform(those, share, budget)
        return [costs.best(model.get_submodule(row.name), row) for row in ranked]

    def ranked(budget: int) -> list[LayerPlan]:
        found = share_out(candidates, budget)
        if asked.objective != "parameters":
            is_slow = lambda row: not costs.is_faster(model.get_submodule(row.name), row)  # noqa: E731
            found = without_slower(candidates, budget, found, share_out, is_slow)
        return found

    def made(rows: Iterable[LayerPlan], rate: float) -> Plan:
        wide, found = sketch.without_grids, {row.name: _narrowed(row, asked.widths) for row in rows}
        is_narrow = any(layer.is_on_grids for layer in (*found.values(), *wide.layers))
        if asked.widths.offers_dense and not is_narrow and not wide.has_room_for(found.values(), rate):
            # The rest becomes smaller only beside a layer on grids: it is the one that loses least.
            found |= _least_lost(candidates)
            is_narrow = True
        used = sketch if is_narrow else wide
        layers = tuple(found.get(layer.name, layer) for layer in used.layers)
        settled = asked.method, rate, asked.rate_decay, asked.scope, asked.allocation
        sizes = sketch.network_params, asked.objective, sketch.unit, sketch.network_bytes, used.beside_saved
        promise = None if keeper is None else keeper.promise
        return Plan(*settled, layers, *sizes, sketch.kept, promise=promise, beside=sketch.beside)

    def at(rate: float) -> Plan:
        return made(ranked(sketch.budget(rate)), rate)

    if keeper is not None and asked.is_timed:
        budget = sketch.budget(sketch.rate)
        return made(keeper.under_limit(candidates, budget if sketch.rate < 1 else math.inf), sketch.rate)
    if asked.target_error is None:
        found = at(sketch.rate)
    else:
        found = _smallest_plan(at, sketch.smallest_rate, asked.target_error)
    if keeper is None:
        return found
    rows = [row for row in found.layers if row.name in names]
    return made(keeper.never_slower(candidates, rows, sketch.budget(found.rate)) or rows, found.rate)


def _least_lost(candidates: Sequence[Candidate]) -> dict[str, LayerPlan]:
    """The layer that loses least by a whole kernel in few bits."""
    rows = [(candidate, candidate.whole()) for candidate in candidates]
    _, row = min(rows, key=lambda pair: pair[0].weight * (pair[1].output_error or 0.0) ** 2)
    return {row.name: row}


def _narrowed(layer: LayerPlan, widths: Widths) -> LayerPlan:
    """A layer that the allocation keeps dense has the width that was asked for, too, if it is one."""
    if layer.method is not None or layer.reason not in (None, SLOWER) or widths.is_choice:
        return layer
    bits = max(widths.bits)
    return layer if bits == FULL else replace(layer, method=DENSE, rank=(), bits=bits)


def _weights(model: nn.Module, layers: list[LayerPlan], rate_decay: str) -> list[float]:
    """The relative rate of each layer: 1 for all, or the number of its block, counted from the first or the last."""
    if rate_decay == "flat":
        return [1.0] * len(layers)
    blocks = find_blocks(model, [layer.name for layer in layers if not layer.is_table])
    depths = [block_of(layer.name, blocks) or 0 for layer in layers]
    return [float(d + 1 if rate_decay == "linear_inc" else len(blocks) - d) for d in depths]


def _smallest_plan(at: Callable[[float], Plan], low: float, target_error: float) -> Plan:
    """The plan with the smallest rate, from `low` on, whose expected error is at most the target."""
    best, high = at(1.0), 1.0
    if _expected(best) > target_error:
        least = _expected(best)
        advice = "use allocation=global" if best.allocation != "global" else "use more bits"
        raise ConfigError([f"target_error={target_error} cannot be met: at rate 1 the error is {least:.4g}; {advice}"])
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
