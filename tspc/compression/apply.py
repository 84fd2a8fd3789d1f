"""Applies a plan to a network: replaces dense layers by tensorized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.moments import Statistics
from tspc.calibration.recalibration import passes, recalibrate_
from tspc.calibration.samples import Calibration, Samples, kept
from tspc.calibration.sketches import Sketch, sketches_of
from tspc.calibration.targets import moments_in_turn
from tspc.compression.curves import naming
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.planning import plan
from tspc.compression.progress import progress_bar
from tspc.compression.selection import FilterFn, why_dense
from tspc.compression.settings import PlanSettings
from tspc.decompositions import Method, Metric
from tspc.layers.dense import DenseLayer, check_values, kernel_of, kernel_shape, kind_of
from tspc.layers.forms import TensorizedLayer, tensorize
from tspc.layers.replacing import refuse_save_pretrained_, replace_layer, warn_of_parameter_hooks, warn_of_state_hooks
from tspc.models.lazy import require_sizes
from tspc.system.modes import is_of_inference, own_modes
from tspc.system.parallel import side_by_side
from tspc.system.tally import counting
from tspc.traversal.copying import copied
from tspc.traversal.hooks import evaluating

OnLayer = Callable[[LayerPlan, Tensor, Metric | None], None]
"""Called after each layer with its row of the plan, the kernel that was fitted, and the norm or None.

The kernel that was fitted is the layer's own, or the compensated one."""


@own_modes()
def compress(
    model: nn.Module,
    method: str | Method | PlanSettings = "tt",
    rate: float | None = None,
    *,
    calibration: Tensor | Iterable[Any] | Samples | None = None,
    settings: Calibration | None = None,
    filter_fn: FilterFn | None = None,
    example: Tensor | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
    progress: bool = False,
    **options: Any,
) -> nn.Module:
    """A compressed copy of `model`; the arguments are those of `tspc.plan`. `progress` shows a bar with the time left.

    With `calibration` data layers are fitted to their outputs, else to their weights. `on_layer` is called with the
    name of a layer after its errors were measured for the plan, and again after it was fitted. A layer with thousands
    of inputs takes seconds. Raises what `plan` and `apply_` raise.
    """
    asked = PlanSettings.of(method, rate, **options)
    require_sizes(model)
    small = copied(model)
    # The predicate is asked about the caller's modules, which it may know.
    chooses = filter_fn and (lambda name, copy: filter_fn(name, model.get_submodule(name)))
    pieces = (1 + asked.needs_curves) * sum(kind_of(module) is not None for module in small.modules())
    with (
        progress_bar(pieces, progress) as tally,
        kept(calibration, settings, model, tally) as samples,
        counting(samples, tally),
    ):

        def done(name: str) -> None:
            tally.add(name)
            on_layer(name)

        ranks = plan(small, asked, calibration=samples, filter_fn=chooses, example=example, on_layer=done)
        warn_of_parameter_hooks({layer.name: model.get_submodule(layer.name) for layer in ranks.tensorized})
        tally.total = tally.done + len(to_fit(small, ranks, samples))
        apply_(small, ranks, samples, lambda layer, *fitted: done(layer.name))
    return small


@own_modes()
def apply_(
    model: nn.Module, plan: Plan, samples: Samples | None = None, on_layer: OnLayer = lambda *fitted: None
) -> Plan:
    """Tensorizes `model` in place; returns the plan with the errors of each layer.

    With `samples` the layers are fitted in function space, in the order in which the network calls them. By default
    each one corrects the errors of the layers before it, also if the plan keeps it dense. Let x be the layer's input in
    the compressed network and y its output in the reference. Then W̃ = Cov(y, x)(Cov(x) + λI)⁻¹ is decomposed in the
    norm of Cov(x), and the mean of y goes into the bias or the batch norm.

    Raises DecompositionError if a kernel cannot be decomposed, or a parameter holds NaN or infinite values. The message
    names the layer, and the network is unchanged.
    """
    small, done = tensorized(model, plan, samples, on_layer)
    for layer in done.tensorized:
        mode = model.get_submodule(layer.name).training
        replace_layer(model, layer.name, small.get_submodule(layer.name).train(mode))
    with torch.inference_mode(is_of_inference(model)):
        model.load_state_dict(small.state_dict())
    refuse_save_pretrained_(model)
    return done


@own_modes()
def tensorized(
    model: nn.Module, plan: Plan, samples: Samples | None = None, on_layer: OnLayer = lambda *fitted: None
) -> tuple[nn.Module, Plan]:
    """A tensorized copy of `model`, in eval mode, and the plan with the errors of each layer; see `apply_`."""
    with evaluating(model), torch.random.fork_rng(devices=[]):
        return _tensorized(model, plan, samples, on_layer)


def _tensorized(model: nn.Module, plan: Plan, samples: Samples | None, on_layer: OnLayer) -> tuple[nn.Module, Plan]:
    work = copied(model)
    done: dict[str, _Done] = {}
    dense = {layer.name: model.get_submodule(layer.name) for layer in plan.tensorized}
    warn_of_state_hooks(dense)
    warn_of_parameter_hooks(dense)
    check_values(model)

    def keep(fitted: _Done, kernel: Tensor, metric: Metric | None) -> None:
        replace_layer(work, fitted.layer.name, fitted.module)
        done[fitted.layer.name] = fitted
        on_layer(fitted.layer, kernel, metric)

    if samples is not None:
        samples.tally.total += passes(model, samples)
        waiting = {layer.name: layer for layer in to_fit(model, plan, samples)}
        survey = samples.survey(model, list(waiting))
        for name, moments in moments_in_turn(model, work, list(waiting), samples, survey.trace):
            layer = _dense(work, name)
            statistics = survey.statistics(name, _dense(model, name), moments, samples)
            del moments  # room for the fit
            # Fitted in the precision of the layer, but at least in float32.
            kernel = statistics.target.to(torch.promote_types(kernel_of(layer).dtype, torch.float32))
            kernel = kernel.reshape(kernel_shape(layer))
            fitted = _fitted(layer, waiting[name], kernel, statistics)
            _shift_(fitted, statistics, work, survey.trace.batch_norms.get(name))
            keep(fitted, kernel, statistics.metric)
        wide = [layer.name for layer in plan.tensorized if layer.name not in done]
        for name, sketch in sketches_of(work, wide, samples, survey):
            layer = _dense(work, name)
            kernel = sketch.kernel.reshape(kernel_shape(layer))
            keep(_fitted(layer, waiting[name], kernel, sketch), kernel, sketch.metric)
    # Without samples, or never called: the kernel alone is used.
    rest = [layer for layer in plan.tensorized if layer.name not in done]
    layers = {layer.name: _dense(work, layer.name) for layer in rest}

    def alone(layer: LayerPlan) -> _Done:
        return _fitted(layers[layer.name], layer, kernel_of(layers[layer.name]), None)

    for layer, fitted in side_by_side(alone, rest, size=lambda layer: layer.dense_params):
        keep(fitted, kernel_of(layers[layer.name]), None)
    if samples is not None:
        recalibrate_(work, model, samples)
    refuse_save_pretrained_(work)
    rows = tuple(done[layer.name].layer if layer.name in done else layer for layer in plan.layers)
    return work, replace(plan, layers=rows)


@dataclass(frozen=True)
class _Done:
    module: nn.Module
    layer: LayerPlan


def _dense(model: nn.Module, name: str) -> DenseLayer:
    return cast(DenseLayer, model.get_submodule(name))


def to_fit(model: nn.Module, plan: Plan, samples: Samples | None) -> list[LayerPlan]:
    """The layers that get another kernel: the tensorized ones, and dense ones that correct the errors before them.

    The kernel of the latter must be their own parameter.
    """
    corrects = samples is not None and samples.settings.compensate
    dense = [layer for layer in plan.layers if corrects and layer.method is None and layer.compensates]
    return [*plan.tensorized, *(layer for layer in dense if why_dense(model.get_submodule(layer.name)) is None)]


def _fitted(dense: DenseLayer, layer: LayerPlan, kernel: Tensor, statistics: Statistics | Sketch | None) -> _Done:
    """The layer's replacement: tensorized, or dense with a kernel that corrects the errors of earlier layers."""
    with naming(layer.name):
        if layer.method is None or layer.rank is None:
            module: nn.Module = copied(dense)
            with torch.no_grad():
                kernel_of(module).copy_(kernel)
        else:
            metric = None if statistics is None else statistics.metric
            module = tensorize(dense, layer.method, layer.rank, kernel=kernel, metric=metric, path=layer.path)
    rebuilt = kernel_of(module).detach()
    note = None
    if isinstance(module, TensorizedLayer):
        with torch.no_grad():
            note = module.decomposition.diagnose(module.factors())
    return _Done(
        module,
        replace(
            layer,
            error=relative_error(kernel_of(dense), rebuilt),
            output_error=None if statistics is None else statistics.error(rebuilt),
            note=note,
        ),
    )


@torch.no_grad()
def relative_error(kernel: Tensor, rebuilt: Tensor) -> float:
    """‖K − K̂‖ ÷ ‖K‖ in the Frobenius norm; 0 if both kernels are zero."""
    # The difference of two close numbers is exact. Only the sums need more digits.
    wide = torch.float32 if kernel.device.type == "mps" else torch.float64
    difference, norm = (torch.linalg.vector_norm(part, dtype=wide) for part in (kernel - rebuilt.to(kernel), kernel))
    return float(difference / norm) if norm > 0 else float(difference)


@torch.no_grad()
def _shift_(done: _Done, statistics: Statistics, model: nn.Module, batch_norm: str | None) -> None:
    """Gives the layer's output the mean of the reference's, through its bias or the batch norm after it."""
    shift = statistics.shift(kernel_of(done.module).detach())
    if shift is None:
        return
    bias = cast("nn.Parameter | None", done.module.bias)
    if bias is not None:
        bias += shift.to(bias)
    elif batch_norm is not None:
        mean = cast(Tensor, model.get_submodule(batch_norm).running_mean)
        mean -= shift.to(mean)
