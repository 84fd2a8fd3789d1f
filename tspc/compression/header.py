"""The header of a compressed network's file, and the check that it is valid before anything is built from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from tspc import decompositions
from tspc.decompositions import Auto, Decomposition
from tspc.errors import ConfigError, TspcError, WeightsError, shortened
from tspc.layers.chains import paths_of
from tspc.models import FAMILIES, NetworkSpec
from tspc.models.described import room_for
from tspc.quantization.grids import BITS, FULL, factor_bytes
from tspc.store.files import parsed_json
from tspc.store.schemas import COUNT, SIZE, problem
from tspc.system.bounds import shown

FORMAT, FORMAT_OF_BASES, FORMAT_OF_PARTS, FORMAT_OF_INTEGERS, FORMAT_OF_NUMBERS = 7, 6, 5, 4, 1
"""Versions of the header's layout; raised when a reader of the old one would fail.

The last one has tied tables in integers, the one before it layers with a basis (`id`), and the one before that parts of
layers and tied tables in floating-point numbers. Files without integers have the first one, which earlier versions
read, too. The second one had integers, but no float16 numbers beside them; in the third one these were vectors only."""

_METHOD = {"name": str}
_LAYER = {
    "method": (_METHOD, COUNT),
    "shape": [SIZE],
    "rank": [SIZE],
    "path?": (str, None),
    "bits?": SIZE,
    "dtype?": str,
}
_NETWORK = {
    **dict.fromkeys(("family", "name"), str),
    **dict.fromkeys(("num_classes?", "image_size?"), (SIZE, None)),
    **{"in_channels?": SIZE, "factory?": (str, None), "kwargs?": dict, "task?": (str, None)},
}
SCHEMA = {
    **{"format": SIZE, "layers": {...: _LAYER}, "methods?": [_METHOD], "network?": (None, _NETWORK), "info": dict},
    **{
        "extra?": dict,
        "buffers?": {...: str},
        "vectors?": [str],
        "shapes?": [[COUNT]],
        "norms?": [str],
        "tied?": {...: str},
    },
}
"""The keys and kinds of values in a header. A layer may name its method by the place in the list `methods`."""


class _DamageError(Exception):
    """A fault in a header; the message does not name the file."""


def checked_header(text: str, elements: int) -> dict[str, Any]:
    """The header in `text` as plain data: `format`, `layers`, `network` and `info`, all of the right kinds.

    `elements` is the number of entries in the file's tensors; factors cannot have more. Ranks fit their kernels, and
    methods and paths are known. The arguments of the network itself are checked where they are used.

    Raises WeightsError for an invalid header; the message does not name the file.
    """
    try:
        return _checked(text, elements)
    except _DamageError as damage:
        raise WeightsError(f"its header is damaged ({damage}); fetch the file again, or make it again") from damage


def _checked(text: str, elements: int) -> dict[str, Any]:
    try:
        header: dict[str, Any] = parsed_json(text, dict)
    except ValueError as error:
        raise _DamageError(shortened(str(error), 200)) from error
    version = header.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise WeightsError(f"it has format {shortened(version)}, this tspc reads up to {FORMAT}: install a newer one")
    wrong = problem(header, SCHEMA)
    if wrong is not None:
        raise _DamageError(shortened(wrong, 200))
    methods = header.get("methods", [])
    for name, layer in header["layers"].items():
        place = layer["method"]
        if isinstance(place, int):
            _require(
                place < len(methods), f"layers.{name}.method", place, f"a place in the list of {len(methods)} methods"
            )
            layer["method"] = methods[place]
    left, tied = elements, (factor.rpartition(".") for factor in header.get("tied", {}))
    # The factors of a layer, or of its links, may be those of another one.
    links = {place for place, _, kind in tied if kind != "bias"}
    sharing = {part for place in links for part in accumulate(place.split("."), "{}.{}".format)}
    for name, layer in header["layers"].items():
        size = _layer_size(f"layers.{name}", layer, elements)
        left -= 0 if name in sharing and size <= elements else size
    if left < 0:
        raise _DamageError("the ranks stand for more numbers than the file holds")
    if header.get("network") is not None:
        _check_network(header["network"], elements)
    return header | {"network": header.get("network")}


def method_of(layer: Mapping[str, Any]) -> Decomposition:
    """The decomposition that a layer of a header actually uses."""
    return decompositions.decomposition_from_dict(layer["method"]).for_shape(tuple(layer["shape"]))


def _layer_size(where: str, layer: dict[str, Any], elements: int) -> int:
    """The number of entries of the layer's factors."""
    shape, rank, path = tuple(layer["shape"]), tuple(layer["rank"]), layer.get("path")
    fits = len(shape) in (2, 4) and math.prod(shape) <= room_for(elements)
    _require(where != "layers.", where, layer, "the name of a layer")
    _require_registered(layer["method"]["name"])
    _require(fits, f"{where}.shape", layer["shape"], "two or four sizes of a kernel that suits the file's weights")
    try:
        method = method_of(layer)
    except (TspcError, TypeError, ValueError, ArithmeticError) as error:
        raise _DamageError(f"{shortened(where)}: {shortened(str(error))}") from error
    top = method.max_rank(shape)
    fits = len(rank) == len(top) and all(r <= most for r, most in zip(rank, top, strict=True))
    _require(fits, f"{where}.rank", layer["rank"], f"{len(top)} entries, up to {list(top)}")
    known = paths_of(method, shape, rank)
    _require(path is None or path in known, f"{where}.path", path, f"one of {', '.join(known)}")
    bits = layer.get("bits", FULL)
    _require(bits in BITS, f"{where}.bits", bits, f"one of {', '.join(map(str, BITS))}")
    if bits == FULL:
        return method.num_params(shape, rank)
    return sum(factor_bytes(factor, bits) for factor in method.factor_shapes(shape, rank))


def _require_registered(method: str) -> None:
    try:
        known = method == Auto.name or decompositions.is_known(method)
    except ConfigError as error:  # of the package that offers it
        raise WeightsError(str(error)) from error
    if not known:
        raise WeightsError(
            f"it was made with method {shown(repr(method))}, which is not registered: install its package, or call "
            "tspc.decompositions.register()(CLASS) first"
        )


def _check_network(network: dict[str, Any], elements: int) -> None:
    more = sorted(set(network) - {field.name for field in dataclasses.fields(NetworkSpec)})
    _require(not more, "network", more, "no such keys")
    family = network["family"]
    _require(family in FAMILIES, "network.family", family, f"one of {', '.join(FAMILIES)}")
    for key in ("num_classes", "in_channels", "image_size"):
        size = network.get(key) or 1
        _require(size <= room_for(elements), f"network.{key}", size, "a size that suits the file's weights")


def _require(ok: bool, where: str, value: Any, expected: str) -> None:
    if not ok:
        raise _DamageError(f"{shortened(where)} is {shortened(value)}, expected {expected}")
