"""Reads weights from files, and never runs code that they contain."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import WeightsError, shortened, some
from tspc.models.safe_files import read_tensors
from tspc.store.files import parsed_json

SUFFIXES = (".safetensors", ".pt", ".pth", ".th")
_WRAPPERS = ("state_dict", "model")
_LATER_OPERANDS = range(0x8C, 0x99)
"""Those that pickle has from protocol 4 on, which PyTorch's restricted reader does not know."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from `.safetensors`, or from `.pt`, `.pth`, `.th` (tensors only).

    The dict may be under the key `state_dict` or `model`, and its keys may start with `module.`.
    Raises WeightsError for a file that is missing, damaged, foreign, or would run code.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise WeightsError(f"pretrained={path}: there is no such file (looked for {os.path.abspath(path)})")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"pretrained={path}: expected a file ending in {', '.join(SUFFIXES)}")
    data = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for wrapper in _WRAPPERS:
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise WeightsError(f"pretrained={path} holds no state dict (a dict of tensors, plain or under {_WRAPPERS})")
    _check_plain(path, data)
    prefix = "module." if all(str(key).startswith("module.") for key in data) else ""
    return {str(key).removeprefix(prefix): value for key, value in data.items()}


def _check_plain(path: Path, data: dict[Any, Tensor]) -> None:
    """Raises WeightsError for the first tensor that is not plain, such as sparse or quantised ones."""
    for name, value in data.items():
        kinds = {
            "nested": value.is_nested,
            "on the meta device, without values": value.is_meta,
            "quantised": value.is_quantized,
            "sparse": value.layout != torch.strided,
        }
        kind = next((kind for kind, found in kinds.items() if found), None)
        if kind is not None:
            raise WeightsError(f"pretrained={path}: {shortened(name)} is {kind}; save plain tensors with all values")


def _read_safetensors(path: Path) -> Any:
    try:
        file = read_tensors(path)
    except WeightsError as error:
        raise WeightsError(f"pretrained={error}") from error
    if file.header is not None and _has_layers(path, file.header):
        raise WeightsError(f"pretrained={path} is a network that tspc has compressed; give the original's weights")
    return file.tensors


def _has_layers(path: Path, header: str) -> bool:
    """Whether a header of tspc names tensorized layers, as far as it can be read."""
    try:
        return bool(parsed_json(header)["layers"])
    except (ValueError, TypeError, LookupError) as error:
        raise WeightsError(f"pretrained={path}: its header is damaged; fetch it again, or make it again") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # PyTorch's warning of an unusual pickle protocol is not needed: the file is read, or refused below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        protocol = re.search(r"Unsupported operand (\d+)", str(error))
        if protocol and int(protocol.group(1)) in _LATER_OPERANDS:
            raise WeightsError(
                f"pretrained={path} is a pickle of protocol 4 or later, which is not read without running code: save "
                "it again by torch.save(state_dict, FILE) without pickle_protocol, or as safetensors"
            ) from error
        if "Weights only load failed" in str(error) and ("GLOBAL" in str(error) or "numpy" in str(error)):
            raise WeightsError(
                f"pretrained={path} is a pickle that holds more than tensors and could run code; it was not loaded: "
                "save its state_dict() alone"
            ) from error
        raise WeightsError(f"pretrained={path} is truncated or is no PyTorch checkpoint") from error
    except Exception as error:  # the restricted unpickler raises nearly anything for a damaged file
        raise WeightsError(f"pretrained={path} is truncated or is no PyTorch checkpoint") from error


def load_state(model: nn.Module, state: dict[str, Any], source: str) -> None:
    """Copies `state` into `model`, all or nothing.

    Raises WeightsError as `check_state`, and if a tensor is of another kind than the network's own (whole, complex,
    truth values).
    """
    check_state(model, state, source)
    differing = [
        f"{name} {_kind(state[name])} instead of {_kind(own)}"
        for name, own in model.state_dict().items()
        if isinstance(own, Tensor) and name in state and _kind(state[name]) != _kind(own) and not _is_counter(name)
    ]
    if differing:
        raise WeightsError(
            f"{source} does not fit the network: of another kind of numbers: {some(map(shortened, differing), 6)}"
        )
    whole = OrderedDict(state)
    # Some networks (MNASNet) refuse a state without the version of its layout, which files do not hold.
    whole._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(whole, strict=False)


def check_state(model: nn.Module, state: dict[str, Any], source: str) -> None:
    """Raises WeightsError if `state` does not fit `model`; it lists missing, unexpected and differently shaped entries.

    Counters that older files lack (`num_batches_tracked`) may be missing.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not _is_counter(k)]
    unexpected = [k for k in state if k not in own]
    differing = [
        f"{k} {_shape(state[k])} instead of {_shape(own[k])}"
        for k in own
        if k in state and _shape(state[k]) != _shape(own[k]) and not k.endswith("_extra_state")
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", differing)]
    problems = [f"{label}: {some(map(shortened, names), 6)}" for label, names in parts if names]
    if problems:
        raise WeightsError(f"{source} does not fit the network: {'; '.join(problems)}")


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _kind(value: Tensor) -> str:
    if value.is_complex() or value.is_floating_point():
        return "complex" if value.is_complex() else "real"
    return "true or false" if value.dtype == torch.bool else "whole"


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
