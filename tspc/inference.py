"""Networks for inference alone: plain modules, without the batch norms that a convolution can take over."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from tspc.dense import AXES, kind_of
from tspc.errors import DataError
from tspc.hooks import evaluating
from tspc.layers import Chain, TensorizedLayer, tensorized_layers
from tspc.walk import trace


@torch.no_grad()
def fold_batch_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a network, in eval mode, that answers the same up to rounding and runs faster.

    Tensorized layers become the ordinary convolutions or dense layers of their paths, and every batch norm whose input
    is just the output of one convolution or dense layer goes into that layer's kernel and bias. `images` is an input of
    the network: one pass shows which these are. The copy needs tspc no more, but has no factors to train on: a layer on
    the path "rebuilt" is as large as the dense one.

    Raises DataError if the network cannot take the images.
    """
    small = copy.deepcopy(model).eval()
    for name, layer in tensorized_layers(small).items():
        _replace(small, name, plain(layer))
    linear = [n for n, m in small.named_modules() if kind_of(m) in ("linear", *AXES) and "weight" in m._parameters]
    with evaluating(small):
        try:
            found = trace(small, linear, images)
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(f"the network cannot take images of shape {tuple(images.shape)}: {error}") from error
    for name, norm in found.batch_norms.items():
        _absorb_(
            cast("nn.Conv1d | nn.Conv2d | nn.Linear", small.get_submodule(name)),
            cast(nn.modules.batchnorm._BatchNorm, small.get_submodule(norm)),
        )
        _replace(small, norm, nn.Identity())
    return small


def plain(layer: TensorizedLayer) -> nn.Module:
    """The convolutions or dense layers that a tensorized layer's path runs, with weights of their own, in eval mode."""
    layer = copy.deepcopy(layer).eval()
    if isinstance(layer, Chain) and layer.runs_factors:
        return nn.Sequential(*layer)
    with torch.no_grad():
        kernels = layer.kernels()
    modules: list[nn.Module] = []
    for i, (stage, kernel) in enumerate(zip(layer.stages, kernels, strict=True)):
        bias = cast("Tensor | None", layer.bias) if i == len(kernels) - 1 else None
        module = layer.form.module(stage, bias is not None, device=kernel.device, dtype=kernel.dtype)
        module.weight = nn.Parameter(kernel.clone())
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        modules.append(module)
    return (modules[0] if len(modules) == 1 else nn.Sequential(*modules)).eval()


def _absorb_(layer: nn.Conv1d | nn.Conv2d | nn.Linear, norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Scales the layer's outputs and shifts its bias as the batch norm would; computed in float64."""
    mean, variance = (cast(Tensor, t).double() for t in (norm.running_mean, norm.running_var))
    scale = (variance + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
    bias = -mean if layer.bias is None else layer.bias.double() - mean
    shift = bias * scale + (0.0 if norm.bias is None else norm.bias.double())
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight))
    layer.bias = nn.Parameter(shift.to(layer.weight))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
