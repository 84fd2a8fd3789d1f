"""The input rows that a layer multiplies its kernel with, and the output rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspc.layers.dense import AXES, DenseLayer, explicit_padding, kernel_shape, kind_of


@dataclass(frozen=True)
class Positions:
    """The positions of a layer's output that are used: every `step`-th row and column of a map, from `offset` on.

    For a dense layer every `step`²-th row is used. Where some positions are padded, `rows` has the numbers of those
    that are used instead.
    """

    step: int = 1
    offset: tuple[int, int] = (0, 0)
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
        step = max(1, math.ceil(math.sqrt(count / most)))
        if isinstance(layer, nn.Conv2d):
            step = min(step, *outputs[-2:])
        elif isinstance(layer, nn.Conv1d):
            step = min(step * step, outputs[-1])
        generator = torch.Generator().manual_seed(seed)
        top, left = torch.randint(step, (2,), generator=generator, device="cpu").tolist()
        return cls(step, (top, left))


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

    `inputs` is (N, C, H, W) or (C, H, W) for a convolution, (N, C, W) or (C, W) for a 1-d convolution, and (…, S) for a
    dense layer. Stride, padding, dilation and groups are taken into account.
    """
    positions = positions or Positions()
    if positions.rows is not None:
        return input_patches(layer, inputs)[:, positions.rows.to(inputs.device)]
    step, (top, left) = positions.step, positions.offset
    if kind_of(layer) not in AXES:
        return inputs.reshape(1, -1, inputs.shape[-1])[:, top * step + left :: step * step]
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    is_flat = isinstance(layer, nn.Conv1d)
    images = inputs if inputs.ndim == 3 + (not is_flat) else inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = F.pad(images, explicit_padding(layer), mode=mode)
    if is_flat:
        columns = images[..., left * layer.stride[0] :]
        columns = columns.unfold(-1, (layer.kernel_size[0] - 1) * layer.dilation[0] + 1, step * layer.stride[0])
        columns = columns[..., :: layer.dilation[0]].movedim(-1, 2).flatten(1, 2)
        return _grouped(columns, layer.groups)
    down, right = layer.stride
    images = images[..., top * down :, left * right :]
    if layer.kernel_size == (1, 1):  # a view instead of a copy
        return _grouped(images[..., :: down * step, :: right * step].flatten(2), layer.groups)
    columns = F.unfold(images, layer.kernel_size, dilation=layer.dilation, stride=(down * step, right * step))
    return _grouped(columns, layer.groups)


def _grouped(columns: Tensor, groups: int) -> Tensor:
    """N × (S·H·W) × positions → groups × (N·positions) × (S·H·W of one group)."""
    n, _, count = columns.shape
    return columns.reshape(n, groups, -1, count).permute(1, 0, 3, 2).reshape(groups, n * count, -1)


def output_rows(layer: DenseLayer, outputs: Tensor, positions: Positions | None = None) -> Tensor:
    """The layer's outputs without its bias, in the order of `input_patches`: positions × T."""
    rows = rows_of(layer, outputs, positions)
    return rows if layer.bias is None else rows - layer.bias


def rows_of(layer: DenseLayer, outputs: Tensor, positions: Positions | None = None) -> Tensor:
    """A tensor with the shape of the layer's outputs, in the order of `input_patches`: positions × T."""
    positions = positions or Positions()
    if positions.rows is not None:
        return rows_of(layer, outputs)[positions.rows.to(outputs.device)]
    step, (top, left) = positions.step, positions.offset
    if kind_of(layer) not in AXES:
        return outputs.reshape(-1, outputs.shape[-1])[top * step + left :: step * step]
    if isinstance(layer, nn.Conv1d):
        maps = outputs if outputs.ndim == 3 else outputs[None]
        return maps[..., left::step].transpose(1, 2).flatten(0, 1)
    maps = outputs if outputs.ndim == 4 else outputs[None]
    return maps[..., top::step, left::step].permute(0, 2, 3, 1).flatten(0, 2)
