"""Rounds the factors of a trained network to grids, in function space."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tspc.calibration.samples import Samples
from tspc.compression.apply import tensorized
from tspc.compression.fits import OnLayer
from tspc.compression.form import DENSE
from tspc.compression.integers import on_grids
from tspc.compression.plan import TABLE, LayerPlan, Plan
from tspc.decompositions import Factors
from tspc.layers.dense import is_table, kernel_of, set_kernel_
from tspc.layers.forms import tensorized_layers
from tspc.layers.tensorized import TensorizedLayer
from tspc.layers.ties import partners_of
from tspc.layers.unpacking import unpack_like_
from tspc.store.state import tensor_state
from tspc.system import processes
from tspc.system.modes import own_modes
from tspc.traversal.copying import copied


def take_off_grids_(model: nn.Module, chosen: Callable[[str], bool] = lambda name: True) -> dict[str, int]:
    """The factors of the chosen layers become floating-point numbers; returns the width that each layer had."""
    widths: dict[str, int] = {}
    for name, layer in on_grids(model).items():
        if chosen(name):
            widths[name] = layer.bits
            layer.take_off_grids_()
    return widths


@own_modes()
@torch.no_grad()
def put_on_grids_(
    model: nn.Module,
    reference: nn.Module,
    widths: Mapping[str, int],
    samples: Samples | None = None,
    on_layer: OnLayer = lambda *fitted: None,
    kept: Collection[str] = (),
) -> None:
    """Rounds the factors of some layers of `model`, in place, as `apply_` rounds them after a decomposition.

    The layers follow each other: each one is rounded for the inputs that the layers before it give once they are
    rounded, and makes up for their errors. `widths` has the bits of each layer. `reference` is the network that was
    compressed; only its structure counts. The parameters named in `kept` keep their numbers. Without `samples` each
    entry is rounded to the nearest value. With several processes the first one rounds, and all get its result.
    """
    layers = {name: layer for name, layer in tensorized_layers(model).items() if name in widths}
    trained = _dense(model, reference)
    ties = partners_of(trained)
    tied = {partner for name in layers for partner in ties.get(name, ())}  # they are rounded with their table
    own = [(name, layer) for name, layer in layers.items() if name not in tied]
    rows = tuple(_row(name, layer, trained.get_submodule(name), widths[name]) for name, layer in own)
    plan = Plan(DENSE, 1.0, "flat", "layers", "uniform", rows, sum(p.numel() for p in trained.parameters()))
    # Whole kernels have no factors to keep: the kernel that makes up for earlier errors is rounded itself.
    known = {name: _values(layer) for name, layer in own if layer.decomposition != DENSE}

    def rounded() -> dict[str, Tensor]:
        found, _ = tensorized(trained, plan, samples, on_layer, known=known, kept=kept)
        return {name: value.cpu() for name, value in tensor_state(found).items()}

    state = processes.by_first(rounded)
    for name, layer in layers.items():
        layer.make_room_for_grids_(widths[name])
    names = tensor_state(model).keys()
    model.load_state_dict({name: value for name, value in state.items() if name in names}, strict=False)


def _dense(model: nn.Module, reference: nn.Module) -> nn.Module:
    """A network of the reference's structure that computes what `model` computes."""
    found = copied(reference)
    unpack_like_(found, model)
    state, own = tensor_state(model), tensor_state(found)
    found.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
    for name, layer in tensorized_layers(model).items():
        dense = found.get_submodule(name)
        set_kernel_(dense, kernel_of(layer))
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)  # type: ignore[union-attr, operator]
    return found


def _values(layer: TensorizedLayer) -> Factors:
    found = layer.factors()
    return replace(found, tensors=tuple(tensor.detach().clone() for tensor in found.tensors))


def _row(name: str, layer: TensorizedLayer, dense: nn.Module, bits: int) -> LayerPlan:
    params, bias = math.prod(layer.shape), 0 if layer.bias is None else layer.shape[0]
    method, rank = layer.decomposition, layer.rank
    sizes = params + bias, method.num_params(layer.shape, rank) + bias
    form = {"path": layer.path, "bits": bits, "entry_bytes": layer.factor_tensors()[0].element_size()}
    kind = TABLE if is_table(dense) else type(dense).__name__
    return LayerPlan(name, kind, layer.shape, *sizes, method, rank, **form)
