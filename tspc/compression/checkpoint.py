"""Compressed networks on disk: a safetensors file with the weights; its header says how to rebuild the layers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.compression.beside import with_narrow, without_narrow
from tspc.compression.form import DENSE, OF_TABLES
from tspc.compression.header import (
    FORMAT,
    FORMAT_OF_BASES,
    FORMAT_OF_INTEGERS,
    FORMAT_OF_NUMBERS,
    FORMAT_OF_PARTS,
    checked_header,
    method_of,
)
from tspc.compression.integers import is_repeated, on_grids, with_integers, without_integers
from tspc.compression.pretrained import mend_save_pretrained_
from tspc.errors import WeightsError, shortened
from tspc.layers.chains import paths_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import DenseLayer, is_table, kernel_shape, kind_of
from tspc.layers.forms import tensorized_layers, untrained
from tspc.layers.replacing import replace_layers, set_modules, warn_of_state_hooks
from tspc.layers.tensorized import BASIS, TensorizedLayer
from tspc.layers.ties import tie_loaded_
from tspc.layers.unpacking import parts_of, unpacked
from tspc.models import NetworkSpec
from tspc.models.described import described_network
from tspc.models.lazy import require_sizes
from tspc.models.safe_files import TensorFile, read_tensors, write_tensors
from tspc.models.weights import check_state, load_state
from tspc.quantization.grids import FULL
from tspc.store.files import write_atomically
from tspc.store.state import packed, take_kinds_, tied_names, unpacked_extra, with_all_names
from tspc.system.modes import own_modes


def save(
    model: nn.Module, path: str | Path, *, network: NetworkSpec | None = None, info: dict[str, Any] | None = None
) -> None:
    """Writes `model` to a safetensors file, atomically.

    The header holds the method, shape and rank of every tensorized layer. With `network`, `tspc.load` can build the
    architecture by itself. `info` is any JSON data that the file should also hold. Raises WeightsError if such a file
    cannot hold a part of the network's state; the message names the part.
    """
    layers = {
        name: {
            "method": layer.decomposition.to_dict(),
            "shape": list(layer.shape),
            "rank": list(layer.rank),
            "path": layer.path,
        }
        | _width(layer)
        for name, layer in tensorized_layers(model).items()
    }
    require_sizes(model)
    tensors, beside = packed(model, once=True)
    compact: dict[str, Any] = {}
    if on_grids(model):
        tensors, compact = with_narrow(with_integers(tensors, model), model)
        compact["methods"] = _by_place_(layers)
    header = (
        {
            "format": _format(model, beside),
            "layers": layers,
            "network": None if network is None else network.to_dict(),
            "info": info or {},
        }
        | beside
        | compact
    )
    write_atomically(Path(path), lambda temporary: write_tensors(temporary, tensors, json.dumps(header)))


def _format(model: nn.Module, beside: dict[str, Any]) -> int:
    """The oldest format whose readers understand the file."""
    tied = beside.get("tied", {})
    if any(is_repeated(name, layer, tied) for name, layer in on_grids(model).items()):
        return FORMAT
    if any(layer.decomposition.has_basis for layer in tensorized_layers(model).values()):
        return FORMAT_OF_BASES
    parts, tables = parts_of(model), tensorized_layers(model).keys() - tensorized_layers(model, tables=False).keys()
    has_low_rank = any(model.get_submodule(name).rank for name in tables)
    if "tied" in beside or has_low_rank or parts & tensorized_layers(model).keys():
        return FORMAT_OF_PARTS
    return FORMAT_OF_INTEGERS if on_grids(model) else FORMAT_OF_NUMBERS


def _by_place_(layers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The methods of the layers, each once; a layer then names its method by the place in this list."""
    methods: list[dict[str, Any]] = []
    for layer in layers.values():
        if layer["method"] not in methods:
            methods.append(layer["method"])
        layer["method"] = methods.index(layer["method"])
    return methods


def _width(layer: TensorizedLayer) -> dict[str, Any]:
    """The width of factors on grids, and the number format in which they compute."""
    if layer.bits == FULL:
        return {}
    return {"bits": layer.bits, "dtype": str(layer.factor_parameters()[0].dtype).removeprefix("torch.")}


@own_modes()
def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Reads a network that `save` wrote; runs no code from the file.

    `model` is the dense architecture, with any weights, also on the meta device. It is tensorized in place and
    returned, in the mode that it had. Without `model` the architecture is built from the file's description, if there
    is one. Parameters and buffers have the dtypes of the file; `requires_grad` comes from the dense layers.

    Raises WeightsError if the file is damaged, was not written by tspc, or does not fit the architecture.
    """
    header, file = _read(path, tensors=True)
    if model is None:
        model = _described(path, header, file)
    require_sizes(model)
    owners = {name.rpartition(".")[0] for name in header["layers"]}
    with unpacked(model, owners.__contains__):
        _load_(model, header, file, path)
    mend_save_pretrained_(model)
    return model


def _load_(model: nn.Module, header: dict[str, Any], file: TensorFile, path: str | Path) -> None:
    """Replaces the layers of the network by those of the file, and loads its state; all or nothing."""
    modules = dict(model.named_modules())
    small = {name: _form(path, modules.get(name), name, layer) for name, layer in header["layers"].items()}
    try:
        state = without_integers(file.tensors, small, header["layers"], header.get("tied"))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    tie_loaded_(model, small)
    replace_layers(model, small)
    try:
        _fill_(model, header, state, path)
    except WeightsError:
        set_modules(model, {name: modules[name] for name in small})
        raise
    for name, module in small.items():
        module.train(modules[name].training)
    warn_of_state_hooks({name: modules[name] for name in small})


def _fill_(model: nn.Module, header: dict[str, Any], state: dict[str, Tensor], path: str | Path) -> None:
    """Loads the state of the file into the network, which has the compressed layers already; all or nothing."""
    try:
        _check_bases(header["layers"], model, state)
        state = with_all_names(model, without_narrow(state, model, header))
        extra = unpacked_extra(header, state)
        check_state(model, state | extra, str(path))
        _check_ties(model, state)
        take_kinds_(model, state, header)
    except WeightsError as error:
        raise WeightsError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    try:
        load_state(model, state | extra, str(path))
    except RuntimeError as error:  # from the network's own set_extra_state, or its hooks
        raise WeightsError(f"{path}: the network does not take its state: {error}") from error


def _check_ties(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises WeightsError if a parameter that several layers of the network share has several values in the file."""
    for name, first in tied_names(model).items():
        if name in state and first in state and not _are_same(state[name], state[first]):
            raise WeightsError(
                f"{shortened(first)} and {shortened(name)} are one parameter in the network given, but differ in the "
                "file; pass the architecture that was compressed"
            )


def _are_same(one: Tensor, other: Tensor) -> bool:
    same = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    return one is other or (one.dtype == other.dtype and torch.allclose(one, other, **same))


def _check_bases(layers: Iterable[str], model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises WeightsError for a layer whose basis has another number of rows than its rank, or is no basis at all."""
    for name in layers:
        layer = cast(TensorizedLayer, model.get_submodule(name))
        basis, method = state.get(f"{name}.{BASIS}"), layer.decomposition
        if basis is None or not method.has_basis:
            continue  # `check_state` tells what is missing, or too much
        if not method.is_basis(basis, layer.shape, layer.rank):
            raise WeightsError(
                f"the basis of layer {shortened(name)} is damaged; fetch the file again, or make it again"
            )


def _form(path: str | Path, dense: nn.Module | None, name: str, layer: dict[str, Any]) -> TensorizedLayer:
    """The tensorized form of `dense`, the architecture's layer `name`, with arbitrary values."""
    if dense is None or kind_of(dense) is None or list(kernel_shape(dense)) != layer["shape"]:
        found = "no such layer" if dense is None else f"{type(dense).__name__}"
        raise WeightsError(
            f"{path}: layer {shortened(name)} was a kernel of shape {layer['shape']}, but the network given has "
            f"{found} there; pass the dense architecture that was compressed"
        )
    method, rank, way = method_of(layer), tuple(layer["rank"]), layer.get("path")
    if is_table(dense) and method not in (DENSE, OF_TABLES):
        raise WeightsError(f"{path}: layer {shortened(name)} is a table of embeddings, which cannot be {method.name}")
    paths = paths_of(method, kernel_shape(dense), rank, Form.of(dense).groups)
    if way is not None and way not in paths:
        raise WeightsError(f"{path}: layer {shortened(name)} has no path {way}; choose one of {', '.join(paths)}")
    return untrained(cast(DenseLayer, dense), method, rank, way, layer.get("bits", FULL))


def read_header(path: str | Path) -> dict[str, Any]:
    """The header that `save` wrote. Raises WeightsError as `load` does."""
    return _read(path, tensors=False)[0]


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `save` wrote. Raises WeightsError as `load` does."""
    header, file = _read(path, tensors=True)
    return header, file.tensors


def _read(path: str | Path, tensors: bool) -> tuple[dict[str, Any], TensorFile]:
    file = read_tensors(path, tensors)
    if file.header is None:
        raise WeightsError(f"{path} holds weights, but was not written by tspc: load it into the network itself")
    try:
        header = checked_header(file.header, file.elements)
        file.tensors.update(
            {name: file.tensors[first] for name, first in header.get("tied", {}).items() if first in file.tensors}
        )
        return header, file
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _described(path: str | Path, header: dict[str, Any], file: TensorFile) -> nn.Module:
    """The dense network that the header describes, with arbitrary weights."""
    description = header["network"]
    if description is None or description["family"] == "custom":
        raise WeightsError(f"{path} does not describe a built-in network: pass the architecture as load(path, model=…)")
    try:
        return described_network(NetworkSpec.from_dict(description), file.elements, len(file.names))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}; pass the architecture as load(path, model=…)") from error
