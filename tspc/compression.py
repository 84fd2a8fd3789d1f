"""Applies a plan to a network: dense layers out, tensorized layers in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from tspc.decompositions import Decomposition, double
from tspc.errors import DecompositionError
from tspc.layers import DenseLayer, TensorizedLayer, tensorize
from tspc.planning import LayerPlan, Plan, plan


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def apply_(model: nn.Module, plan: Plan, on_layer: Callable[[LayerPlan], None] | None = None) -> Plan:
    """Tensorizes `model` in place; returns the plan with the relative error of each layer filled in.

    Raises DecompositionError, naming the layer, if a kernel cannot be decomposed (NaN, infinity); the
    network is then unchanged.
    """
    done: dict[str, tuple[TensorizedLayer, LayerPlan]] = {}
    for layer in plan.tensorized:
        assert layer.method is not None
        assert layer.rank is not None
        dense = cast(DenseLayer, model.get_submodule(layer.name))
        try:
            small = tensorize(dense, layer.method, layer.rank)
        except DecompositionError as error:
            raise DecompositionError(f"layer {layer.name}: {error}") from error
        done[layer.name] = small, replace(layer, error=relative_error(dense, small))
        if on_layer is not None:
            on_layer(done[layer.name][1])
    for name, (small, _) in done.items():
        set_module(model, name, small)
    return replace(plan, layers=tuple(done[x.name][1] if x.name in done else x for x in plan.layers))


@torch.no_grad()
def relative_error(dense: DenseLayer, small: TensorizedLayer) -> float:
    """‖K − K̂‖ ÷ ‖K‖ in the Frobenius norm; 0 for a zero kernel that is met exactly."""
    kernel = double(dense.weight)
    difference = torch.linalg.vector_norm(kernel - double(small.weight))
    norm = torch.linalg.vector_norm(kernel)
    return float(difference / norm) if norm > 0 else float(difference)


def compress(model: nn.Module, method: str | Decomposition = "tt", rate: float = 0.2, **options: Any) -> nn.Module:
    """A compressed copy of `model`, from its weights alone; `options` are those of `tspc.plan`."""
    small = copy.deepcopy(model)
    apply_(small, plan(small, method, rate, **options))
    return small
