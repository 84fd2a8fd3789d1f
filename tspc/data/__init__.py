"""Data sets by kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tspc.data import small
from tspc.data.base import Batch, Data, Feed, generator_of
from tspc.data.folder import image_folder
from tspc.data.layout import Contiguous
from tspc.data.model_inputs import (
    Given,
    ModelInputs,
    answer_of,
    answered,
    arguments_of,
    called,
    filled,
    first_of,
    kinds_of,
    masks_of,
    unpadded,
)
from tspc.data.spec import KINDS_IN_FOLDERS, NO_DATA, DataSpec
from tspc.errors import ConfigError

__all__ = [
    "KINDS",
    "KINDS_IN_FOLDERS",
    "NO_DATA",
    "Batch",
    "Contiguous",
    "Data",
    "DataSpec",
    "Feed",
    "Given",
    "ModelInputs",
    "answer_of",
    "answered",
    "arguments_of",
    "called",
    "filled",
    "first_of",
    "generator_of",
    "kinds_of",
    "load_data",
    "masks_of",
    "unpadded",
]

KINDS: dict[str, Callable[[DataSpec, Path | None, bool], Data]] = {
    "digits": small.digits,
    "idx": small.idx,
    "cifar10": small.cifar10,
    "folder": image_folder,
    "synthetic": small.synthetic,
}


class _Key:
    """Hashes a spec by its text, because its options are a dict."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return hash(repr(self.spec))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.spec == other.spec


def load_data(spec: DataSpec, data_dir: str | Path | None = None, download: bool = True) -> Data:
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
