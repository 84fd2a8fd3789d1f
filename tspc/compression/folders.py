"""Compressed networks of transformers in a folder: weights, configuration and tokenizer; read again in one line.

A folder holds `model.safetensors` as `checkpoint.save` writes it, `config.json`, `generation_config.json`, and what was
beside the network. `from_pretrained` refuses it, because it would fill the compressed layers with random values.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tspc.compression import checkpoint
from tspc.compression.integers import on_grids
from tspc.errors import RunError, TspcError, TspcWarning, WeightsError, some
from tspc.layers.forms import tensorized_layers
from tspc.models import NetworkSpec
from tspc.models.safe_files import read_tensors
from tspc.models.transformers_folders import CONFIG, GENERATION, described_in_json, network_in, network_of
from tspc.store.files import PARTIAL, why_unwritten, write_json
from tspc.system.launch import is_first
from tspc.traversal.copying import copied

WEIGHTS = "model.safetensors"
BESIDE = (
    *("tokenizer*.json", "vocab*.json", "vocab*.txt", "merges*.txt", "special_tokens_map.json", "added_tokens.json"),
    *("normalizer.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "*.model"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json"),
)
"""Files of tokenizers, processors and sentence-transformers: data, never code."""


def save(
    model: nn.Module,
    path: str | Path,
    *,
    network: NetworkSpec | None = None,
    info: dict[str, Any] | None = None,
    beside: Any = None,
) -> None:
    """Writes `model` to a safetensors file, or to a folder if it is a network of transformers; atomically.

    A path with a slash at its end or without an ending is a folder, and so is one that is there already. It holds the
    configuration, too, and `tspc.load(folder)` gives the network back without its architecture. `beside` is a tokenizer
    or a processor, or the folder of the network before: its tokenizer's and processor's files are carried along, and
    those of sentence-transformers, but no code. A folder of an earlier `save` is replaced; any other is left alone.

    The header of the file holds the method, shape and rank of every tensorized layer. With `network`, `tspc.load` can
    build the architecture of a file by itself. `info` is any JSON data that the file should also hold.

    Raises WeightsError if a file cannot hold a part of the network's state, and if another network than one of
    transformers is given a folder; RunError if the folder holds something else, or cannot be written.
    """
    if not _is_folder(model, path, beside):
        checkpoint.save(model, path, network=network, info=info)
        return
    folder = Path(path)
    if network_of(model) is None:
        raise WeightsError(
            f"{folder} is a folder, and {type(model).__name__} is no network of transformers, whose configuration "
            f'would be in it; name a file: tspc.save(model, "{folder / "small.safetensors"}")'
        )
    if not is_first():
        return
    _refuse_another(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    try:
        temporary.mkdir(parents=True)
        write_into(model, temporary, info=info)
        _carry(beside, temporary)
        _put(temporary, folder)
    except OSError as error:
        reason, _ = why_unwritten(error, temporary / WEIGHTS)
        raise RunError(f"cannot write {folder}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Reads a network that `save` wrote, from a file or a folder; runs no code from it.

    `model` is the dense architecture, with any weights, also on the meta device. It is tensorized in place and
    returned, in the mode that it had. Without `model` the architecture is built from the file's description, if there
    is one, or from the folder's configuration; a network from a folder is in eval mode. Parameters and buffers have the
    dtypes of the file; `requires_grad` comes from the dense layers.

    Raises WeightsError if the file is damaged, was not written by tspc, or does not fit the architecture.
    """
    if not os.path.isdir(path):
        return checkpoint.load(path, model)
    folder = Path(path)
    weights = folder / WEIGHTS
    if not weights.exists():
        raise WeightsError(f"{folder} holds no {WEIGHTS}: tspc.load takes a folder that tspc.save wrote")
    if model is None:
        checkpoint.read_header(weights)  # before anything is built
        file = read_tensors(weights, tensors=False)
        model = network_in(folder, file.elements, len(file.names))
    return checkpoint.load(weights, model)


def write_into(model: nn.Module, folder: Path, info: dict[str, Any] | None = None) -> None:
    """Writes the weights and the configuration of a network of transformers into a folder, each file atomically."""
    network: Any = network_of(model)
    told = described_in_json(model, is_compressed=bool(tensorized_layers(model)))
    checkpoint.save(model, folder / WEIGHTS, info=info)
    write_json(folder / CONFIG, told)
    if network.can_generate():
        write_json(folder / GENERATION, json.loads(network.generation_config.to_json_string()))


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """What transformers' `save_pretrained` is for a compressed network: writes what `tspc.load(folder)` reads.

    Other files in the folder stay, such as those of a Trainer's checkpoint. `state_dict` takes the place of the
    network's own state. Raises TspcError for `push_to_hub`, and for a state that does not fit.
    """
    if push_to_hub:
        raise TspcError(
            "a compressed network is not pushed by save_pretrained; save it, and upload the folder with "
            "huggingface_hub.upload_folder"
        )
    if not is_main_process or not is_first():
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    if state_dict is not None:
        model = copied(model)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise TspcError(f"the state given is not that of the whole compressed network: {error}") from error
    if on_grids(model):
        warnings.warn(
            f"{folder}: the factors are saved as the integers that they are rounded to; training goes on from there "
            "with tspc.load(folder), not with resume_from_checkpoint",
            TspcWarning,
            stacklevel=3,
        )
    write_into(model, folder)


def _is_folder(model: nn.Module, path: str | Path, beside: Any) -> bool:
    if beside is not None or str(path).endswith(("/", os.sep)) or os.path.isdir(path):
        return True
    return not Path(path).suffix and network_of(model) is not None and not os.path.exists(path)


def _refuse_another(folder: Path) -> None:
    """Raises RunError if there is something at this place that `save` did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; choose another folder, or a file's name with an ending")
    known = {WEIGHTS, CONFIG, GENERATION, *(str(path.relative_to(folder)) for path in _beside_in(folder))}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    foreign = sorted(found - known)
    if not foreign and WEIGHTS in found and read_tensors(folder / WEIGHTS, tensors=False).header is None:
        foreign = [f"{WEIGHTS}, which tspc did not write"]
    if foreign:
        raise RunError(f"{folder} holds {some(foreign)}; choose an empty or a new folder")


def _beside_in(folder: Path) -> list[Path]:
    return sorted({path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()})


def _carry(beside: Any, folder: Path) -> None:
    """Copies the files of a tokenizer or a processor, or those in a folder."""
    if beside is None:
        return
    if hasattr(beside, "save_pretrained"):
        source = folder / "beside"
        beside.save_pretrained(str(source))
    else:
        source = Path(beside)
        if not source.is_dir():
            raise WeightsError(f"beside={str(beside)!r} is no folder, and no tokenizer or processor")
    for path in _beside_in(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    shutil.rmtree(folder / "beside", ignore_errors=True)


def _put(temporary: Path, folder: Path) -> None:
    """Renames the whole folder; an older one is there until the new one is."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}{PARTIAL}")
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
