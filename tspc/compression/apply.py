"""Applies a plan to a network: replaces dense layers by tensorized layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tspc.calibration.recalibration import passes, recalibrate_
from tspc.calibration.samples import Calibration, Samples, kept
from tspc.compression.beside import narrow_beside_
from tspc.compression.fits import Fits, OnLayer
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.planning import plan
from tspc.compression.progress import FIT, progress_bar, work_on
from tspc.compression.selection import FilterFn, why_dense
from tspc.compression.settings import PlanSettings
from tspc.decompositions import Factors, Method
from tspc.layers.dense import check_values, has_inputs, kind_of
from tspc.layers.replacing import refuse_save_pretrained_, replace_layers, warn_of_parameter_hooks, warn_of_state_hooks
from tspc.models.lazy import require_sizes
from tspc.store.state import tensor_state
from tspc.system import processes
from tspc.system.modes import is_of_inference, own_modes
from tspc.system.tally import counting
from tspc.traversal.copying import copied
from tspc.traversal.hooks import evaluating


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
    spread: bool = False,
    **options: Any,
) -> nn.Module:
    """A compressed copy of `model`; the arguments are those of `tspc.plan`. `progress` shows a bar with the time left.

    With `calibration` data layers are fitted to their outputs, else to their weights. `on_layer` is called with the
    name of a layer after its errors were measured for the plan, and again after it was fitted. A layer with thousands
    of inputs takes seconds.

    With `spread` all processes of `torch.distributed` call this together, with the same network and the same data, each
    on its own device. They share the work on layers that do not depend on each other, and all get the same network.

    Raises what `plan` and `apply_` raise. With `spread` an error in one process is raised in all.
    """
    asked = PlanSettings.of(method, rate, **options)
    require_sizes(model)
    small = copied(model)
    # The predicate is asked about the caller's modules, which it may know.
    chooses = filter_fn and (lambda name, copy: filter_fn(name, model.get_submodule(name)))
    counted = kind_of if asked.widths.offers_dense else has_inputs
    layers = {name: layer for name, layer in small.named_modules() if counted(layer)}
    sizes = {name: work_on(sum(p.numel() for p in layer.parameters())) for name, layer in layers.items()}
    total = (FIT + asked.needs_curves) * sum(sizes.values())
    with (
        processes.sharing(spread),
        progress_bar(total, progress) as tally,
        kept(calibration, settings, model, tally) as samples,
        counting(samples, tally),
    ):

        def done(name: str, times: int = 1) -> None:
            tally.add(name, times * sizes[name])
            on_layer(name)

        ranks = plan(small, asked, calibration=samples, filter_fn=chooses, example=example, on_layer=done)
        warn_of_parameter_hooks({layer.name: model.get_submodule(layer.name) for layer in ranks.tensorized})
        tally.total = tally.done + FIT * sum(sizes[layer.name] for layer in to_fit(small, ranks, samples))
        apply_(small, ranks, samples, lambda layer, *fitted: done(layer.name, FIT))
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

    If factors lie on grids, what the network holds beside them is rounded, too (`narrow_beside_`).

    Raises DecompositionError if a kernel cannot be decomposed, or a parameter holds NaN or infinite values. The message
    names the layer, and the network is unchanged.
    """
    # Fits to the kernels alone change no parameter of the copy, so it needs none of its own.
    small, done = tensorized(model, plan, samples, on_layer, shares_tensors=samples is None)
    modes = {layer.name: model.get_submodule(layer.name).training for layer in done.tensorized}
    replace_layers(model, {name: small.get_submodule(name).train(mode) for name, mode in modes.items()})
    if samples is not None:
        with torch.inference_mode(is_of_inference(model)):
            model.load_state_dict(small.state_dict())
    refuse_save_pretrained_(model)
    return done


@own_modes()
def tensorized(
    model: nn.Module,
    plan: Plan,
    samples: Samples | None = None,
    on_layer: OnLayer = lambda *fitted: None,
    *,
    shares_tensors: bool = False,
    known: Mapping[str, Factors] | None = None,
    kept: Collection[str] = (),
) -> tuple[nn.Module, Plan]:
    """A tensorized copy of `model`, in eval mode, and the plan with the errors of each layer; see `apply_`.

    With `shares_tensors` what is not tensorized has the parameters and buffers of `model`; only without `samples`. The
    factors of some layers may be `known`; they are only rounded to their grids. The parameters named in `kept` are not
    rounded.
    """
    with evaluating(model), torch.random.fork_rng(devices=[]):
        fits = Fits(model, copied(model, shares_tensors), on_layer, known)
        small, done = _tensorized(model, fits, plan, samples, kept)
    if processes.is_shared():  # what each process has computed itself may differ in the last bits
        first = processes.by_first(lambda: {name: value.cpu() for name, value in tensor_state(small).items()})
        small.load_state_dict(first, strict=False)
    return small, done


def _tensorized(
    model: nn.Module, fits: Fits, plan: Plan, samples: Samples | None, kept: Collection[str]
) -> tuple[nn.Module, Plan]:
    dense = {layer.name: model.get_submodule(layer.name) for layer in plan.tensorized}
    warn_of_state_hooks(dense)
    warn_of_parameter_hooks(dense)
    check_values(model)
    if samples is not None:
        samples.tally.total += passes(model, samples)
        tables = [layer for layer in plan.tensorized if layer.is_table]
        layers = [layer for layer in to_fit(model, plan, samples) if not layer.is_table]
        survey = samples.survey(model, [layer.name for layer in layers], [layer.name for layer in tables])
        fits.to_counts(tables, samples, survey)
        fits.to_moments(layers, samples, survey)
        wide = [layer for layer in plan.tensorized if layer.name not in fits.done and not layer.is_table]
        fits.to_sketches(wide, samples, survey)
    # Without samples, or never called: the kernel alone is used.
    fits.to_kernels([layer for layer in plan.tensorized if layer.name not in fits.done])
    if samples is not None:
        recalibrate_(fits.work, model, samples)
    if any(layer.is_on_grids for layer in plan.layers):
        narrow_beside_(fits.work, {*plan.kept, *kept})
    refuse_save_pretrained_(fits.work)
    return fits.work, replace(plan, layers=tuple(fits.done.get(layer.name, layer) for layer in plan.layers))


def to_fit(model: nn.Module, plan: Plan, samples: Samples | None) -> list[LayerPlan]:
    """The layers that get another kernel: the tensorized ones, and dense ones that correct the errors before them.

    The kernel of the latter must be their own parameter.
    """
    corrects = samples is not None and samples.settings.compensate
    dense = [layer for layer in plan.layers if corrects and layer.method is None and layer.compensates]
    return [*plan.tensorized, *(layer for layer in dense if why_dense(model.get_submodule(layer.name)) is None)]
