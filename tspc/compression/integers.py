"""Factors on grids as they lie in a file: the integers without gaps, beside the scales."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tspc.compression.beside import state_saved
from tspc.compression.selection import DTYPES
from tspc.errors import WeightsError, shortened
from tspc.layers.forms import tensorized_layers
from tspc.layers.tensorized import TensorizedLayer, scales_of
from tspc.quantization.grids import FULL, SCALE_BYTES, Grid, factor_bytes, row_count
from tspc.quantization.packing import packed, unpacked
from tspc.store.state import tensor_state, tied_names

FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
"""The number formats in which factors compute, by name."""
ENTRY = "integers"
"""The name of a layer's entry: for each factor its scales (bfloat16), then its integers."""


def on_grids(model: nn.Module) -> dict[str, TensorizedLayer]:
    """The layers whose factors lie on grids, by name."""
    return {name: layer for name, layer in tensorized_layers(model).items() if layer.bits != FULL}


def state_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, as a file holds them."""
    total, apart, tied = 0, set[str](), tied_names(model).keys()
    for layer_name, layer in on_grids(model).items():
        names = _factor_names(layer_name, layer)
        apart |= set(names)
        total += 0 if is_repeated(layer_name, layer, tied) else _layer_bytes(layer)
    if apart:
        total -= state_saved(model)
        apart |= _all_scales(model)
    apart |= tied  # a shared parameter counts once
    return total + sum(t.numel() * t.element_size() for name, t in tensor_state(model).items() if name not in apart)


def with_integers(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file; factors on grids are replaced by one vector of bytes for each layer.

    Layers that share their factors have one vector together, under the name of the first of them. Raises WeightsError
    for factors with NaN or infinite entries, which no integer can be.
    """
    scales, tied = _all_scales(model), tied_names(model).keys()
    found = {name: value for name, value in tensors.items() if name not in scales}
    for layer_name, layer in on_grids(model).items():
        parts, names = [], _factor_names(layer_name, layer)
        for name, factor, grid in zip(names, layer.factor_tensors(), layer.grids, strict=True):
            found.pop(name, None)
            if not bool(factor.isfinite().all()):
                raise WeightsError(f"{name} holds NaN or infinite values, which {layer.bits} bits cannot be")
            parts.append(grid.scales.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8))
            parts.append(packed(grid.integers(factor.detach()), layer.bits))
        if not is_repeated(layer_name, layer, tied):
            found[f"{layer_name}.{ENTRY}"] = torch.cat(parts)
    return found


def without_integers(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    header: Mapping[str, Any],
    tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The inverse of `with_integers`: factors with values on the grids, and their scales, as in the `layers`' state.

    `header` describes the layers, and `tied` has the first name of each factor with several names. Raises WeightsError
    for an entry that is missing or damaged, and for layers that share factors in two forms.
    """
    found, tied = dict(tensors), tied or {}
    owners: dict[str, tuple[str, str]] = {}
    """For each factor its layer, and the name of its scales."""
    narrow = [(x, layer) for x, layer in layers.items() if isinstance(layer, TensorizedLayer) and layer.bits != FULL]
    for layer_name, layer in narrow:
        names = _factor_names(layer_name, layer)
        if is_repeated(layer_name, layer, tied):
            continue
        dtype = FORMATS.get(str(header[layer_name].get("dtype", "float32")))
        data = found.pop(f"{layer_name}.{ENTRY}", None)
        expected = _layer_bytes(layer)
        if dtype is None or data is None or data.dtype != torch.uint8 or tuple(data.shape) != (expected,):
            raise WeightsError(_damaged(layer_name))
        values: list[Tensor] = []
        own = zip(names, layer.factor_tensors(), _scales(layer_name, layer), strict=True)
        for name, factor, scales_name in own:
            scales, integers, data = _split(data, tuple(factor.shape), layer.bits)
            if not bool((scales.isfinite() & (scales > 0)).all()):
                raise WeightsError(_damaged(layer_name))
            wide = integers.to(torch.promote_types(dtype, torch.float32)).reshape(factor.shape)
            values.append(Grid(layer.bits, scales).values(wide, dtype))
            found[scales_name] = scales.view(torch.int32)
            owners[name] = layer_name, scales_name
        found |= {name: x.contiguous() for name, x in zip(names, layer.as_parameters(values), strict=True)}
    for layer_name, layer in narrow:
        names = _factor_names(layer_name, layer)
        for name, scales_name in zip(names, _scales(layer_name, layer), strict=True):
            if name in tied:
                owner, first_scales = owners.get(tied[name], ("", ""))
                if not owner or _form(header[owner]) != _form(header[layer_name]):
                    raise WeightsError(_damaged(layer_name))
                found |= {name: found[tied[name]], scales_name: found[first_scales]}
    return found


def _form(layer: Mapping[str, Any]) -> list[Any]:
    """What layers that share their factors have in common."""
    return [layer.get(key) for key in ("method", "shape", "rank", "bits", "dtype")]


def _layer_bytes(layer: TensorizedLayer) -> int:
    """The bytes of a layer's factors, with their scales."""
    return sum(factor_bytes(tuple(factor.shape), layer.bits) for factor in layer.factor_tensors())


def _damaged(layer: str) -> str:
    return (
        f"the integers of layer {shortened(layer)} are missing, damaged, or not those of its rank; fetch the file "
        "again, or make it again"
    )


def _split(data: Tensor, shape: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scales and integers of the first factor, and what is left of the bytes."""
    entries, start = math.prod(shape), SCALE_BYTES * row_count(shape)
    end = factor_bytes(shape, bits)
    scales = data[:start].clone().view(torch.bfloat16).float()
    return scales, unpacked(data[start:end], bits, entries), data[end:]


def _factor_names(layer_name: str, layer: TensorizedLayer) -> list[str]:
    """The names of the factors' parameters in the network's state."""
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    return [f"{layer_name}.{names[id(parameter)]}" for parameter in layer.factor_parameters()]


def is_repeated(layer_name: str, layer: TensorizedLayer, tied: Container[str]) -> bool:
    """Whether the layer's factors are those of another one, under `tied` names: a file holds them once."""
    return any(name in tied for name in _factor_names(layer_name, layer))


def _all_scales(model: nn.Module) -> set[str]:
    """The names of all scales in the network's state; a layer may have several names."""
    own = {id(layer.get_buffer(scales_of(i))) for layer in on_grids(model).values() for i in range(len(layer.grids))}
    return {name for name, value in model.state_dict(keep_vars=True).items() if id(value) in own}


def _scales(layer_name: str, layer: TensorizedLayer) -> list[str]:
    """The names of the scales in the network's state, factor by factor."""
    return [f"{layer_name}.{scales_of(i)}" for i in range(len(layer.grids))]
