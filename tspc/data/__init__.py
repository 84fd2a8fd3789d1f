"""Data sets by kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tspc.data import small
from tspc.data.answers import answer_of, answered
from tspc.data.base import Batch, Data, Feed, at_once, generator_of
from tspc.data.collating import IGNORED
from tspc.data.folder import image_folder
from tspc.data.layout import Contiguous
from tspc.data.model_inputs import (
    Given,
    ModelInputs,
    arguments_of,
    called,
    filled,
    first_of,
    has_lengths,
    kinds_of,
    masks_of,
    shapes_of,
    unpadded,
)
from tspc.data.own import own_data
from tspc.data.spec import KINDS_IN_FOLDERS, LOADED_KINDS, NO_DATA, DataSpec
from tspc.data.text_files import LABELLED
from tspc.data.text_spec import BYTES, OWN_KIND, TEXT_KINDS, OwnSpec, TextSpec
from tspc.data.texts import library_data, text_data
from tspc.data.tokenizers import tokenizer_of
from tspc.errors import ConfigError

__all__ = [
    "BYTES",
    "IGNORED",
    "KINDS",
    "KINDS_IN_FOLDERS",
    "LABELLED",
    "LOADED_KINDS",
    "NO_DATA",
    "OWN_KIND",
    "TEXT_KINDS",
    "AnySpec",
    "Batch",
    "Contiguous",
    "Data",
    "DataSpec",
    "Feed",
    "Given",
    "ModelInputs",
    "OwnSpec",
    "TextSpec",
    "answer_of",
    "answered",
    "arguments_of",
    "at_once",
    "called",
    "filled",
    "first_of",
    "has_lengths",
    "generator_of",
    "kinds_of",
    "load_data",
    "masks_of",
    "shapes_of",
    "tokenizer_of",
    "unpadded",
]

AnySpec = DataSpec | TextSpec | OwnSpec
"""The description of a data set: of images, of texts, or of what a function gives."""

KINDS: dict[str, Callable[[Any, Path | None, bool], Data]] = {
    "digits": small.digits,
    "idx": small.idx,
    "cifar10": small.cifar10,
    "folder": image_folder,
    "synthetic": small.synthetic,
    "text": text_data,
    "datasets": library_data,
    OWN_KIND: own_data,
}


class _Key:
    """Hashes a spec by its text, because its options are a dict."""

    def __init__(self, spec: AnySpec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return hash(repr(self.spec))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.spec == other.spec


def load_data(spec: AnySpec, data_dir: str | Path | None = None, download: bool = True) -> Data:
    """The data set that `spec` describes. The jobs of a sweep in one process share it.

    With `download`, torchvision may download the files if they are not in `data_dir` (or ./data).

    Raises ConfigError for an unknown kind, and DataError if the data is missing, damaged or does not fit the spec.
    """
    return _load(_Key(spec), None if data_dir is None else Path(data_dir), download)


@lru_cache(maxsize=2)
def _load(key: _Key, data_dir: Path | None, download: bool) -> Data:
    kind = key.spec.kind
    if kind not in KINDS:
        raise ConfigError([f"dataset.kind={kind!r} is unknown; choose one of {', '.join(KINDS)}"])
    return KINDS[kind](key.spec, data_dir, download)
