"""Data that a function of the user's gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from tspc.data.base import Data
from tspc.data.collating import tensor_of
from tspc.data.examples import Examples, Split
from tspc.data.text_spec import OwnSpec
from tspc.errors import ConfigError, DataError, TspcError
from tspc.system.imports import named

NEEDED = (
    *("num_classes", "train_size", "test_size", "fresh_size", "fresh_fingerprint", "fingerprint", "steps"),
    *("train_batches", "test_batches", "held_out_batches", "fresh_batches", "calibration_batches"),
)
"""What an object has that is a data set itself."""


def own_data(spec: OwnSpec, data_dir: Path | None, download: bool) -> Data:
    """What the factory gives: a data set (`tspc.data.Data`), or splits (train, test) and perhaps a third, held out.

    A split has a length and gives by its number a pair: the network's arguments by name (or one tensor), and a target.
    The factory gets the `options`, and `data_dir` if the command names one. Raises ConfigError if it cannot be
    imported, fails or returns something else; DataError for splits that cannot be read.
    """
    build: Callable[..., Any] = named(spec.factory, "dataset.factory")
    given = dict(spec.options) | ({} if data_dir is None else {"data_dir": str(data_dir)})
    what = f"dataset.factory={spec.factory!r}"
    try:
        made = build(**given)
    except TspcError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError([f"{what} failed: {type(error).__name__}: {error}{_hint(build, given)}"]) from error
    if all(hasattr(made, name) for name in NEEDED):
        return cast(Data, made)
    if not (isinstance(made, tuple | list) and len(made) in (2, 3) and all(map(_is_split, made))):
        told = "it must return (train, test), each with a length and pairs (inputs, target), or a tspc.data.Data"
        raise ConfigError([f"{what} returned {type(made).__name__}: {told}"])
    splits: dict[str, Split] = dict(zip(("train", "test", "held_out"), made, strict=False))
    for name, split in splits.items():
        _look(split, f"{what}: the split {name}")
    try:
        return Examples(spec.name, spec.num_classes or _classes(splits), splits)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def _is_split(made: Any) -> bool:
    return hasattr(made, "__len__") and hasattr(made, "__getitem__") and not isinstance(made, str | torch.Tensor | dict)


def _look(split: Split, where: str) -> None:
    """Raises DataError if the first example cannot be read, or is no pair."""
    if not len(split):
        return
    try:
        first = split[0]
    except Exception as error:  # the user's own code
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    if not (isinstance(first, tuple | list) and len(first) == 2):
        raise DataError(f"{where} gives {type(first).__name__}; expected pairs (inputs, target)")
    tensor_of(first[1], f"{where}: a target")


def _classes(splits: dict[str, Split]) -> int:
    """One more than the largest target, if the targets are single whole numbers; else 1."""
    first = tensor_of(splits["train"][0][1], "a target")
    if first.ndim or first.is_floating_point():
        return 1
    targets = [int(tensor_of(split[place][1], "a target")) for split in splits.values() for place in range(len(split))]
    return max(1, max(targets) + 1)


def _hint(build: Any, given: dict[str, Any]) -> str:
    """What helps if the function does not take its arguments."""
    try:
        inspect.signature(build).bind(**given)
    except TypeError:
        return f"; it was called with {', '.join(given) or 'no arguments'}: see dataset.options and data_dir"
    except ValueError:
        return ""
    return ""
