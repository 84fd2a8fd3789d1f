"""Reading weights from files without running anything that they contain."""

from __future__ import annotations

import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tspc.errors import WeightsError, shortened
from tspc.files import parsed_json
from tspc.models.safe_files import read_tensors

SUFFIXES = (".safetensors", ".pt", ".pth", ".th")
_WRAPPERS = ("state_dict", "model")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from `.safetensors`, or from `.pt`, `.pth`, `.th` (tensors only).

    The dict may lie under `state_dict` or `model`, and its keys may start with `module.`.
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
    prefix = "module." if all(str(key).startswith("module.") for key in data) else ""
    return {str(key).removeprefix(prefix): value for key, value in data.items()}


def _read_safetensors(path: Path) -> Any:
    try:
        file = read_tensors(path)
    except WeightsError as error:
        raise WeightsError(f"pretrained={error}") from error
    if file.header is not None and _has_layers(path, file.header):
        raise WeightsError(f"pretrained={path} is a network that tspc has compressed; give the original's weights")
    return file.tensors


def _has_layers(path: Path, header: str) -> bool:
    """Whether a header of tspc tells of tensorized layers, as far as it can be read."""
    try:
        return bool(parsed_json(header)["layers"])
    except (ValueError, TypeError, LookupError) as error:
        raise WeightsError(f"pretrained={path}: its header is damaged; fetch it again, or make it again") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # A file of an odd pickle protocol is read or refused below; either way that is all there is to say.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise WeightsError(
                f"pretrained={path} is a pickle that holds more than tensors and could run code; it was not loaded: "
                "save its state_dict() alone"
            ) from error
        raise WeightsError(f"pretrained={path} is truncated or is no PyTorch checkpoint") from error
    except Exception as error:  # the restricted unpickler raises nearly anything for a damaged file
        raise WeightsError(f"pretrained={path} is truncated or is no PyTorch checkpoint") from error


def load_state(model: nn.Module, state: dict[str, Any], source: str) -> None:
    """Copies `state` into `model`, all of it or nothing. Raises WeightsError as `check_state`."""
    check_state(model, state, source)
    whole = OrderedDict(state)
    # Some networks (MNASNet) refuse a state that does not tell the version of its layout, as files do not.
    whole._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(whole, strict=False)


def check_state(model: nn.Module, state: dict[str, Any], source: str) -> None:
    """Raises WeightsError, listing what is missing, unexpected, or of another shape, if `state` does not fit `model`.

    Counters that older files lack (`num_batches_tracked`) may be missing.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    differing = [
        f"{k} {_shape(state[k])} instead of {_shape(own[k])}"
        for k in own
        if k in state and _shape(state[k]) != _shape(own[k]) and not k.endswith("_extra_state")
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", differing)]
    problems = [f"{label}: {_some(names)}" for label, names in parts if names]
    if problems:
        raise WeightsError(f"{source} does not fit the network: {'; '.join(problems)}")


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shortened(name) for name in names[:limit]) + more
