"""Factors on grids as they lie in a file: the integers without gaps, beside the scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import WeightsError, shortened
from tspc.layers.forms import tensorized_layers
from tspc.layers.tensorized import TensorizedLayer
from tspc.quantization.grids import FULL, SCALE_BYTES, Grid, factor_bytes, row_count
from tspc.quantization.packing import packed, unpacked
from tspc.store.state import tensor_state

ENTRY = "integers"
"""The name of a layer's entry: for each factor its scales (bfloat16), then its integers."""


def on_grids(model: nn.Module) -> dict[str, TensorizedLayer]:
    """The layers whose factors lie on grids, by name."""
    return {name: layer for name, layer in tensorized_layers(model).items() if layer.bits != FULL}


def state_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, as a file holds them."""
    layers = on_grids(model)
    narrow = {id(p): layer.bits for layer in layers.values() for p in layer.factor_parameters()}
    shapes = {
        id(p): tuple(f.shape)
        for layer in layers.values()
        for p, f in zip(layer.factor_parameters(), layer.factor_tensors(), strict=True)
    }
    parameters = {name: p for name, p in model.state_dict(keep_vars=True).items() if id(p) in narrow}
    rest = sum(t.numel() * t.element_size() for name, t in tensor_state(model).items() if name not in parameters)
    return rest + sum(factor_bytes(shapes[id(p)], narrow[id(p)]) for p in parameters.values())


def with_integers(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file; factors on grids are replaced by one vector of bytes for each layer."""
    found = dict(tensors)
    for layer_name, layer in on_grids(model).items():
        parts = []
        for name, factor, grid in _factors(layer_name, layer):
            found.pop(name, None)
            parts.append(grid.scales.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8))
            parts.append(packed(grid.integers(factor.detach()), layer.bits))
        found[f"{layer_name}.{ENTRY}"] = torch.cat(parts)
    return found


def without_integers(
    tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module], header: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The inverse of `with_integers`: factors with values on the grids, which the `layers` also take.

    `header` has the number format of each layer's factors. Raises WeightsError if an entry is missing or too short.
    """
    found = dict(tensors)
    for layer_name, layer in layers.items():
        if not isinstance(layer, TensorizedLayer) or layer.bits == FULL:
            continue
        dtype = getattr(torch, str(header[layer_name].get("dtype", "float32")), None)
        data = found.pop(f"{layer_name}.{ENTRY}", None)
        factors = list(_factors(layer_name, layer))
        expected = sum(factor_bytes(tuple(factor.shape), layer.bits) for _, factor, _ in factors)
        if not isinstance(dtype, torch.dtype) or data is None or data.dtype != torch.uint8 or data.numel() != expected:
            raise WeightsError(
                f"the integers of layer {shortened(layer_name)} are missing or not those of its rank; fetch the file "
                "again, or make it again"
            )
        grids = []
        for name, factor, _ in factors:
            scales, integers, data = _split(data, tuple(factor.shape), layer.bits)
            grids.append(Grid(layer.bits, scales.to(dtype)))
            values = integers.to(dtype).reshape(factor.shape)
            own = values * grids[-1].scales.reshape(-1, *(1 for _ in factor.shape[1:]))
            found[name] = own.reshape(_parameter(layer, name.removeprefix(f"{layer_name}.")).shape)
        layer.put_on_(grids)
    return found


def _split(data: Tensor, shape: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scales and integers of the first factor, and what is left of the bytes."""
    entries, start = math.prod(shape), SCALE_BYTES * row_count(shape)
    end = factor_bytes(shape, bits)
    scales = data[:start].clone().view(torch.bfloat16)
    return scales, unpacked(data[start:end], bits, entries), data[end:]


def _factors(layer_name: str, layer: TensorizedLayer) -> Iterator[tuple[str, Tensor, Grid]]:
    """For each factor the name of its parameter in the network's state, its values, and its grid."""
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    of_layer = zip(layer.factor_parameters(), layer.factor_tensors(), layer.grids, strict=True)
    for parameter, factor, grid in of_layer:
        yield f"{layer_name}.{names[id(parameter)]}", factor, grid


def _parameter(layer: TensorizedLayer, name: str) -> nn.Parameter:
    return layer.get_parameter(name)
