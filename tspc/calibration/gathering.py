"""The moments of the layers' inputs in an uncompressed network."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.moments import Moments
from tspc.calibration.patches import Positions, input_patches
from tspc.calibration.samples import Part, Samples, is_centred
from tspc.layers.convolutions import Form
from tspc.layers.dense import TRANSPOSED, DenseLayer, kernel_of, kernel_shape
from tspc.system.parallel import in_parts
from tspc.traversal.tracing import Trace
from tspc.traversal.walk import Walker

WIDEST = 8192
"""Longest input patch whose second moments are kept (half a gigabyte in float64)."""


def is_narrow(layer: nn.Module) -> bool:
    """Whether the second moments of the layer's inputs can be kept."""
    return _entries(layer) <= WIDEST**2


def _entries(layer: nn.Module) -> int:
    """The number of entries in the second moments of the layer's inputs, over all groups of its channels."""
    return getattr(layer, "groups", 1) * kernel_of(layer)[0].numel() ** 2


def megabytes(model: nn.Module, name: str) -> float:
    """The memory of the second moments of the layer's inputs."""
    return 8 * _entries(model.get_submodule(name)) / 2**20


def moments_of(
    model: nn.Module, layers: Collection[str], samples: Samples, trace: Trace, images: Part | None = None
) -> Iterator[tuple[str, Moments]]:
    """The moments of each layer's inputs in an uncompressed network, over all samples or a part of them.

    Layers that are never called, or whose inputs are too wide, are left out.
    """
    walker = samples.walk(model, trace, images)
    try:
        for segment in trace.segments:
            walker.advance()
            inside = [name for name in segment.layers if name in layers and is_narrow(model.get_submodule(name))]
            # As many as fit into memory together.
            parts = list(in_parts(inside, lambda name: megabytes(model, name), samples.settings.memory))
            for part in parts:
                found = gather(walker, part, samples, for_the_last_time=part is parts[-1])
                for name in part:
                    if name in found:
                        yield name, found.pop(name)  # given away, so that its memory can be freed
    finally:
        walker.close()


def gather(
    walker: Walker, layers: Collection[str], samples: Samples, for_the_last_time: bool = False
) -> dict[str, Moments]:
    """The moments of the layers' inputs in the present segment, without layers that are not called."""
    moments: dict[str, Moments] = {}
    firsts = with_the_same_rows(walker.model, walker.trace, layers)

    def see(name: str, batch: int, inputs: Tensor, outputs: Tensor) -> None:
        if firsts[name] == name:
            layer = cast(DenseLayer, walker.model.get_submodule(name))
            positions = positions_of(layer, name, batch, outputs.shape, samples)
            x = input_patches(layer, inputs, positions)
            weights = samples.weights.at(walker.trace.sharing(name), batch, positions, x.shape[1])
            moments.setdefault(name, Moments(x.shape[-1], None, x.device, len(x))).add(x, weights=weights)

    walker.calls_of(layers, see, for_the_last_time)
    return {
        name: moments[first] if first == name else moments[first].beside(None)
        for name, first in firsts.items()
        if first in moments
    }


def with_the_same_rows(model: nn.Module, trace: Trace, layers: Collection[str]) -> dict[str, str]:
    """For each layer the first of them that multiplies its kernel with the same rows, as query, key and value do."""
    firsts: dict[tuple[Any, ...], str] = {}
    found = {}
    for name in layers:
        layer = cast(DenseLayer, model.get_submodule(name))
        form = Form.of(layer), kernel_shape(layer)[1:], is_centred(layer, name, trace)
        # A call of a transposed convolution may ask for a size of its own.
        alone = name if form[0].kind in TRANSPOSED else None
        found[name] = firsts.setdefault((trace.same_input[name], *form, alone), name)
    return found


def positions_of(layer: DenseLayer, name: str, batch: int, outputs: torch.Size, samples: Samples) -> Positions:
    """Which of a layer's outputs count; the same ones in the reference and in the compressed network."""
    seed, masks = zlib.crc32(name.encode()) + batch, samples.kept.masks(batch, name)
    return Positions.at_most(samples.patches_of_a_batch, layer, outputs, seed, masks)
