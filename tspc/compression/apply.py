"""Applies a plan to a network: replaces dense layers by tensorized layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from tspc.calibration.recalibration import passes, recalibrate_
from tspc.calibration.samples import Samples
from tspc.calibration.tables import heads_of
from tspc.compression.beside import narrow_beside_
from tspc.compression.fits import Fits, OnLayer
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.pretrained import mend_save_pretrained_
from tspc.compression.selection import why_dense
from tspc.decompositions import Factors
from tspc.errors import ConfigError
from tspc.layers.dense import check_values
from tspc.layers.replacing import replace_layers, warn_of_parameter_hooks, warn_of_state_hooks
from tspc.layers.tensorized import TensorizedLayer
from tspc.layers.ties import partners_of, share_bias_
from tspc.layers.unpacking import of_parts, unpacked
from tspc.store.state import tensor_state
from tspc.system import processes
from tspc.system.modes import is_of_inference, own_modes
from tspc.traversal.copying import copied
from tspc.traversal.hooks import evaluating


@own_modes()
@of_parts
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
    names the layer, and the network is unchanged. Raises ConfigError for inputs that are no `Samples`.
    """
    if samples is not None and not isinstance(samples, Samples):
        raise ConfigError(
            [f"samples is {type(samples).__name__}: give apply_ tspc.Samples(inputs, tspc.Calibration())"]
        )
    # Fits to the kernels alone change no parameter of the copy, so it needs none of its own.
    small, done = tensorized(model, plan, samples, on_layer, shares_tensors=samples is None)
    ties, names = partners_of(model), [layer.name for layer in done.tensorized]
    names += [partner for layer in done.tensorized for partner in ties.get(layer.name, ())]
    dense = {name: model.get_submodule(name) for name in names}
    modes, state = {name: module.training for name, module in dense.items()}, small.state_dict()
    replace_layers(model, {name: small.get_submodule(name).train(mode) for name, mode in modes.items()})
    for name in names[len(done.tensorized) :]:
        share_bias_(cast(TensorizedLayer, model.get_submodule(name)), dense[name])
    if samples is not None:
        with torch.inference_mode(is_of_inference(model)):
            model.load_state_dict(state)
    mend_save_pretrained_(model)
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
    with evaluating(model):
        small = copied(model, shares_tensors)
    with unpacked(model), unpacked(small), evaluating(model), torch.random.fork_rng(devices=[]):
        fits = Fits(model, small, on_layer, known)
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
    before = fits.work.named_parameters(remove_duplicate=False)
    kept_ids = {id(x) for name, x in before if name in plan.kept}  # a layer may get another name for its bias
    if samples is not None:
        samples.tally.total += passes(model, samples)
        tables = [layer for layer in plan.tensorized if layer.is_table]
        layers = [layer for layer in to_fit(model, plan, samples) if not layer.is_table]
        names = [table.name for table in tables]
        survey = samples.survey(model, [layer.name for layer in layers], [*names, *heads_of(model, names)])
        fits.to_counts(tables, samples, survey)
        fits.to_moments(layers, samples, survey)
        wide = [layer for layer in plan.tensorized if layer.name not in fits.done and not layer.is_table]
        fits.to_sketches(wide, samples, survey)
    # Without samples, or never called: the kernel alone is used.
    fits.to_kernels([layer for layer in plan.tensorized if layer.name not in fits.done])
    if samples is not None:
        recalibrate_(fits.work, model, samples)
    if any(layer.is_on_grids for layer in plan.layers):
        after = fits.work.named_parameters(remove_duplicate=False)
        narrow_beside_(fits.work, {*kept, *(name for name, x in after if id(x) in kept_ids)})
    mend_save_pretrained_(fits.work)
    return fits.work, replace(plan, layers=tuple(fits.done.get(layer.name, layer) for layer in plan.layers))


@of_parts
def to_fit(model: nn.Module, plan: Plan, samples: Samples | None) -> list[LayerPlan]:
    """The layers that get another kernel: the tensorized ones, and dense ones that correct the errors before them.

    The kernel of the latter must be their own parameter. If nothing is tensorized there are no errors to correct.
    """
    corrects = samples is not None and samples.settings.compensate and plan.tensorized
    dense = [layer for layer in plan.layers if corrects and layer.method is None and layer.compensates]
    return [*plan.tensorized, *(layer for layer in dense if why_dense(model.get_submodule(layer.name)) is None)]
