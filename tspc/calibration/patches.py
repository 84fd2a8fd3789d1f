"""The input rows that a layer multiplies its kernel with, and the output rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspc.layers.convolutions import Form, explicit_padding
from tspc.layers.dense import AXES, TRANSPOSED, Convolution, DenseLayer, kernel_shape, kind_of


@dataclass(frozen=True)
class Positions:
    """The positions of a layer's output that are used: every `step`-th one along each axis of a map, from `offset` on.

    For a dense layer every `step`²-th row is used. `offset` has an entry for each axis of a map; of a signal the last
    one counts. `size` is that of the whole map; a transposed convolution has others, too, if the network asks for one.
    Where some positions are padded, `rows` has the numbers of those that are used instead.
    """

    step: int = 1
    offset: tuple[int, ...] = (0, 0)
    size: tuple[int, ...] | None = None
    rows: Tensor | None = None

    @classmethod
    def at_most(
        cls, most: int, layer: DenseLayer, outputs: torch.Size, seed: int, masks: Sequence[Tensor] = ()
    ) -> Positions:
        """About `most` positions of a batch of outputs; the offset is random, the same for equal arguments.

        `masks` say which positions of the batch hold something, see `filled_rows`.
        """
        filled = filled_rows(layer, outputs, masks)
        if filled is not None:
            apart = max(1, math.ceil(len(filled) / most))
            generator = torch.Generator().manual_seed(seed)
            return cls(rows=filled[int(torch.randint(apart, (1,), generator=generator, device="cpu")) :: apart])
        count = outputs.numel() // kernel_shape(layer)[0]
        axes = len(AXES.get(kind_of(layer) or "", ""))
        share = count / most
        step = max(1, math.ceil(math.sqrt(share) if axes < 3 else share ** (1 / axes)))
        if axes:
            step = min(step * step if axes == 1 else step, *outputs[-axes:])
        if kind_of(layer) in TRANSPOSED:
            step = _all_phases(step, cast(Convolution, layer).stride)
        generator = torch.Generator().manual_seed(seed)
        offset = torch.randint(step, (max(2, axes),), generator=generator, device="cpu").tolist()
        return cls(step, tuple(offset), tuple(outputs[-axes:]) if axes else None)

    def along(self, axes: int) -> list[slice]:
        """The positions along each axis of a map."""
        return [slice(start, None, self.step) for start in (*(0,) * (axes - len(self.offset)), *self.offset)[-axes:]]


def _all_phases(step: int, stride: Sequence[int]) -> int:
    """The largest step, up to this one, that has no divisor in common with a stride.

    The outputs of a transposed convolution at positions with the same remainder by the stride see the same taps. With
    another step some taps would never be seen.
    """
    return next(one for one in range(step, 0, -1) if all(math.gcd(one, each) == 1 for each in stride))


def filled_rows(layer: DenseLayer, outputs: torch.Size, masks: Sequence[Tensor]) -> Tensor | None:
    """The numbers of a layer's output rows that hold something, in the order of `rows_of`; None if all count.

    This is known where the leading axes of the outputs are those of a mask (N, L), apart or in one: of a dense layer
    over tokens, of a 1-d convolution that keeps the length. Elsewhere, as in the experts behind a router, all count.
    """
    if kind_of(layer) == "conv1d":
        lead = (outputs[0], outputs[2]) if len(outputs) == 3 else ()
    else:
        lead = () if kind_of(layer) in AXES else tuple(outputs[:-1])
    fitting = (mask for mask in masks if lead in (tuple(mask.shape), (mask.numel(),)))
    mask = next(fitting, None)
    return None if mask is None else mask.flatten().nonzero().flatten()


def input_patches(layer: DenseLayer, inputs: Tensor, positions: Positions | None = None) -> Tensor:
    """The rows that the layer multiplies its kernel with: groups × positions × (S·H·W of one group).

    `inputs` is (N, C, …) or (C, …) for a convolution, with one to three spatial axes, and (…, S) for a dense layer.
    Stride, padding, dilation and groups are taken into account.
    """
    positions = positions or Positions()
    if positions.rows is not None:
        return input_patches(layer, inputs)[:, positions.rows.to(inputs.device)]
    kind = kind_of(layer)
    if kind not in AXES:
        step, (top, left) = positions.step, positions.offset
        return inputs.reshape(1, -1, inputs.shape[-1])[:, top * step + left :: step * step]
    assert isinstance(layer, Convolution)
    axes = len(AXES[kind])
    images = inputs if inputs.ndim == axes + 2 else inputs[None]
    stride = layer.stride
    if kind in TRANSPOSED:
        images, stride = _spread(layer, images, positions.size), (1,) * axes
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        images = F.pad(images, explicit_padding(layer), mode=mode)
    starts = [slice(one.start * by, None) for one, by in zip(positions.along(axes), stride, strict=True)]
    images = images[(..., *starts)]
    columns = _columns(images, layer.kernel_size, layer.dilation, [positions.step * each for each in stride])
    if kind in TRANSPOSED:
        taps = columns.unflatten(1, (-1, *layer.kernel_size))
        columns = taps.flip(tuple(range(2, 2 + axes))).flatten(1, 1 + axes)
    return _grouped(columns, layer.groups)


def _columns(images: Tensor, window: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The patches of images without padding: N × (channels · window) × positions."""
    axes = len(window)
    if math.prod(window) == 1:  # a view instead of a copy
        return images[(..., *(slice(None, None, step) for step in stride))].flatten(2)
    if axes == 2:
        return F.unfold(images, tuple(window), dilation=tuple(dilation), stride=tuple(stride))
    for axis in range(axes):
        images = images.unfold(2 + axis, (window[axis] - 1) * dilation[axis] + 1, stride[axis])
        images = images[..., :: dilation[axis]]
    taps = range(2 + axes, 2 + 2 * axes)
    return images.movedim(tuple(taps), tuple(range(2, 2 + axes))).flatten(1, 1 + axes).flatten(2)


def _spread(layer: Convolution, images: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """The input of a transposed convolution with zeros in between and around: an ordinary one then has its outputs."""
    form, inputs = Form.of(layer), images.shape[2:]
    size = size or tuple(form.length(axis, inputs[axis]) for axis in range(len(inputs)))
    wide = images.new_zeros(*images.shape[:2], *((n - 1) * by + 1 for n, by in zip(inputs, layer.stride, strict=True)))
    wide[(..., *(slice(None, None, by) for by in layer.stride))] = images
    sides: list[int] = []
    for axis in reversed(range(len(inputs))):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        before = reach - int(layer.padding[axis])
        sides += [before, size[axis] + reach - before - wide.shape[2 + axis]]
    return F.pad(wide, sides)  # a negative number cuts off


def _grouped(columns: Tensor, groups: int) -> Tensor:
    """N × (S·H·W) × positions → groups × (N·positions) × (S·H·W of one group)."""
    n, _, count = columns.shape
    return columns.reshape(n, groups, -1, count).permute(1, 0, 3, 2).reshape(groups, n * count, -1)


def output_rows(layer: DenseLayer, outputs: Tensor, positions: Positions | None = None) -> Tensor:
    """The layer's outputs without its bias, in the order of `input_patches`: positions × T."""
    rows = rows_of(layer, outputs, positions)
    return rows if layer.bias is None else rows - layer.bias


def rows_of(layer: nn.Module, outputs: Tensor, positions: Positions | None = None) -> Tensor:
    """A tensor with the shape of the layer's outputs, in the order of `input_patches`: positions × T."""
    positions = positions or Positions()
    if positions.rows is not None:
        return rows_of(layer, outputs)[positions.rows.to(outputs.device)]
    kind = kind_of(layer)
    if kind not in AXES:
        step, (top, left) = positions.step, positions.offset
        return outputs.reshape(-1, outputs.shape[-1])[top * step + left :: step * step]
    axes = len(AXES[kind])
    maps = outputs if outputs.ndim == axes + 2 else outputs[None]
    return maps[(..., *positions.along(axes))].movedim(1, -1).flatten(0, -2)
