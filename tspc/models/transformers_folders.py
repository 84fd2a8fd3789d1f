"""Networks of transformers beside their configuration: what a folder holds, and the network that it describes.

A folder may come from anybody, so nothing in it is executed. The class is one of transformers' own, and a field of the
configuration that would make it load something else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from tspc.errors import WeightsError, shortened
from tspc.models.described import LOADING, built_within
from tspc.models.transformers_tasks import Wrapped, wrapped
from tspc.system import extras

CONFIG, GENERATION = "config.json", "generation_config.json"
OURS, ELSEWHERE = "tspc", "transformers_weights"
"""Fields of the configuration: how tspc uses the network, and where transformers would find its weights."""
REMEDY = "its layers are compressed: load this folder with tspc.load(FOLDER), not with from_pretrained"
"""In the place of a file's name, so that `from_pretrained` raises an error with this text."""
DROPPED = frozenset(
    {OURS, ELSEWHERE, "architectures", "auto_map", "attn_implementation", "experts_implementation"}
    | {"transformers_version"}
)
"""Fields of the configuration that do not reach the network, or would choose code."""


def network_of(model: nn.Module) -> nn.Module | None:
    """The network of transformers that `model` is, or wraps; None if it is none."""
    inner = model.network if isinstance(model, Wrapped) else model
    return inner if is_of_transformers(inner) else None


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module is a network of transformers with a configuration; the library is not imported for that."""
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).mro())


def described_in_json(model: nn.Module, is_compressed: bool) -> dict[str, Any]:
    """What `config.json` says of a network of transformers, or of a wrapper around one.

    Raises WeightsError for a network whose class is not one of transformers' own.
    """
    network = network_of(model)
    assert network is not None
    kind = type(network).__name__
    if _class(kind) is not type(network):
        raise WeightsError(
            f"{kind} is no class of transformers itself, so a folder cannot say how to build it; "
            'save it to a file: tspc.save(model, "small.safetensors")'
        )
    config: Any = network.config
    found = json.loads(config.to_json_string(use_diff=True)) | {"architectures": [kind]}
    found["dtype"] = str(next(iter(network.parameters())).dtype).removeprefix("torch.")
    if isinstance(model, Wrapped):
        found[OURS] = model.describe()
    if is_compressed:
        found[ELSEWHERE] = REMEDY
    return found


def network_in(folder: Path, elements: int, tensors: int) -> nn.Module:
    """The dense network that a folder describes, with arbitrary weights; in its wrapper if it had one.

    `elements` and `tensors` count the entries and tensors of the weights; a far larger network is not built. Raises
    WeightsError if the folder describes no network of transformers, or asks for anything to be loaded.
    """
    extras.require("transformers", f"the network in {folder}")
    told = _read(folder / CONFIG)
    names = told.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    kind = _class(name)
    if kind is None or getattr(kind, "config_class", None) is None:
        raise WeightsError(f"{folder / CONFIG} names the architecture {shortened(names)}, which transformers lacks")
    if kind.config_class.model_type != told.get("model_type"):
        raise WeightsError(f"{folder / CONFIG}: {name} is no network of type {shortened(told.get('model_type'))}")
    try:
        usual = vars(kind.config_class())
        if any(LOADING.search(key) and not key.startswith("_") and value for key, value in usual.items()):
            raise WeightsError(f"transformers may load other things to build {name}")
        fields = _fields({key: value for key, value in told.items() if key != "model_type"}, usual)
        config = kind.config_class.from_dict(fields)
    except WeightsError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from error
    except Exception as error:  # each configuration has its own checks
        raise WeightsError(f"{folder / CONFIG} is no configuration of {name}: {shortened(str(error))}") from error
    network = built_within(lambda: kind(config), name, elements, tensors).eval()
    _take_generation_(network, folder / GENERATION)
    return wrapped(network, told[OURS]).eval() if OURS in told else network


def _class(name: str) -> Any:
    """The network of transformers with this name; None if there is none."""
    import transformers

    if not re.fullmatch(r"[A-Za-z]\w*", name):
        return None
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _fields(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the network's own configuration has. Raises WeightsError for one that loads something."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        inner = usual.get(key)
        if LOADING.search(key) and not key.startswith("_") and value not in (None, False, "", inner):
            raise WeightsError(f"it sets {shortened(key)} to {shortened(value)}, which is not taken from a folder")
        if key in DROPPED or key.startswith("_") or LOADING.search(key):
            continue
        is_nested = isinstance(value, dict) and hasattr(inner, "to_dict")
        found[key] = _fields(cast("dict[str, Any]", value), vars(inner)) if is_nested else value
    return found


def _take_generation_(network: nn.Module, path: Path) -> None:
    """Gives a network the settings of `generate` that lie beside it."""
    if not path.exists() or not getattr(network, "can_generate", lambda: False)():
        return
    from transformers import GenerationConfig

    try:
        network.generation_config = GenerationConfig.from_dict(_read(path))  # type: ignore[assignment]
    except WeightsError:
        raise
    except Exception as error:  # the library's own checks
        raise WeightsError(f"{path} holds no settings of generate: {shortened(str(error))}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist: the folder holds no network of transformers") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read {path} ({shortened(str(error))}); fetch the folder again") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no fields by name; fetch the folder again")
    return found
