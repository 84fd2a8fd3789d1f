"""Files of tensors in the safetensors format: read whole or refused, with checksums if tspc wrote them."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tspc.errors import WeightsError, shortened

HEADER, CHECKSUMS = "tspc", "checksums"
"""Keys of the metadata: tspc's header, and the checksums of the header and of the tensors."""


@dataclass(frozen=True)
class TensorFile:
    """The content of a file. `header` is tspc's own text, if tspc wrote the file; `elements` counts all numbers."""

    header: str | None
    elements: int
    names: tuple[str, ...]
    tensors: dict[str, Tensor]


def write_tensors(path: Path, state: dict[str, Tensor], header: str) -> None:
    """Writes contiguous tensors with tspc's header and the checksums of both; the bytes are the same every time."""
    save_file(state, path, {HEADER: header, CHECKSUMS: json.dumps([_sum_of_text(header), _sum_of(state)])})
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the entries of the metadata in an order that changes from one write to the next."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # Without spaces, and with other letters than ASCII as they are, it is as long as it was.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


def read_tensors(path: str | Path, tensors: bool = True) -> TensorFile:
    """What is in the file; without `tensors` their values are not read.

    Raises WeightsError, which names the file, if it is missing, no regular file, damaged or not as its checksums say.
    """
    if not os.path.isfile(path):
        raise WeightsError(f"{path} is not a file" if os.path.exists(path) else f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = tuple(file.keys())
            elements = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
            state = {name: file.get_tensor(name) for name in (names if tensors else ())}
    except (SafetensorError, OSError, ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        reason = shortened(str(error)) or type(error).__name__
        raise WeightsError(
            f"{path} is not a whole safetensors file ({reason}); remove it, and make it again"
        ) from error
    header = metadata.get(HEADER)
    if header is not None and not _is_intact(metadata.get(CHECKSUMS), header, state if tensors else None):
        raise WeightsError(
            f"{path} is damaged: its content is not what was written, by its checksum; fetch or make it again"
        )
    return TensorFile(header, elements, names, state)


def _is_intact(sums: str | None, header: str, state: dict[str, Tensor] | None) -> bool:
    """Whether header and tensors are as they were written; true if an older version wrote no checksums."""
    if sums is None:
        return True
    try:
        of_text, of_tensors = json.loads(sums)
    except (ValueError, TypeError, RecursionError):
        return False
    return of_text == _sum_of_text(header) and (state is None or of_tensors == _sum_of(state))


def _sum_of_text(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass"))


def _sum_of(state: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(state):
        value = state[name]
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        if value.numel():
            total = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total
