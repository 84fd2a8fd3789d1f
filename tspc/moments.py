"""The statistics of a layer's inputs, and what they ask of its kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspc import processes
from tspc.decompositions import Metric, double
from tspc.dense import AXES, DenseLayer, explicit_padding, kernel_shape, kind_of

ROWS = 8
"""Rows for each input from which on second moments are trusted as they are."""
LEAST_ROWS = 2
"""Rows for each input without which the layer's own kernel is the best known."""
SCARCITY = 0.1
"""Damping, relative to the mean second moment, for each input without a row to itself."""


@dataclass(frozen=True)
class Positions:
    """The positions of a layer's output to look at: every `step`-th row and column of a map, from `offset` on.

    Of a dense layer, every `step`²-th row.
    """

    step: int = 1
    offset: tuple[int, int] = (0, 0)

    @classmethod
    def at_most(cls, most: int, layer: DenseLayer, outputs: Tensor, seed: int) -> Positions:
        """About `most` of all positions in a batch of outputs; the offset is random, the same for equal arguments."""
        count = outputs.numel() // kernel_shape(layer)[0]
        step = max(1, math.ceil(math.sqrt(count / most)))
        if isinstance(layer, nn.Conv2d):
            step = min(step, *outputs.shape[-2:])
        elif isinstance(layer, nn.Conv1d):
            step = min(step * step, outputs.shape[-1])
        top, left = torch.randint(step, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        return cls(step, (top, left))


def input_patches(layer: DenseLayer, inputs: Tensor, positions: Positions | None = None) -> Tensor:
    """The rows that the layer multiplies its kernel with: groups × positions × (S·H·W of one group).

    `inputs` is (N, C, H, W), or (C, H, W), for a convolution with any stride, padding, dilation and groups (without
    H in 1-d), and (…, S) for a dense layer.
    """
    positions = positions or Positions()
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


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """The square blocks on a matrix's diagonal: groups × T/groups × T/groups."""
    size = len(matrix) // groups
    return matrix.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def rows_of(layer: DenseLayer, outputs: Tensor, positions: Positions | None = None) -> Tensor:
    """Anything of the shape of the layer's outputs in the order of `input_patches`: positions × T."""
    positions = positions or Positions()
    step, (top, left) = positions.step, positions.offset
    if kind_of(layer) not in AXES:
        return outputs.reshape(-1, outputs.shape[-1])[top * step + left :: step * step]
    if isinstance(layer, nn.Conv1d):
        maps = outputs if outputs.ndim == 3 else outputs[None]
        return maps[..., left::step].transpose(1, 2).flatten(0, 1)
    maps = outputs if outputs.ndim == 4 else outputs[None]
    return maps[..., top::step, left::step].permute(0, 2, 3, 1).flatten(0, 2)


@dataclass(frozen=True)
class Statistics:
    """What one layer should do, given its inputs x: answer with y, the reference's output without its bias.

    With `centred`, a constant can be added to the layer's output, so that only what varies counts: the means are
    taken off all second moments. `target` is the kernel (T × n) that answers best. All else is kept for each group of
    the layer's channels, one for most layers, g of them with t = T/g outputs: `mean_x` (g × n), `mean_y` (g × t),
    `inputs` is E[xxᵀ] + `damping`·I (g × n × n; `damping` g × 1 × 1), `cross` E[yxᵀ] (g × t × n), `outputs` E[yyᵀ]
    (g × t × t), `weights` how much the outputs count (g × t × t; None: all alike). A kernel that is decomposed as one
    tensor for all groups is fitted in one norm, `metric`: that of the groups' mean inputs.
    """

    target: Tensor
    centred: bool
    mean_x: Tensor
    mean_y: Tensor
    damping: Tensor
    inputs: Tensor
    cross: Tensor
    outputs: Tensor
    weights: Tensor | None

    @cached_property
    def metric(self) -> Metric:
        if len(self.inputs) == 1:
            return Metric(self.inputs[0], None if self.weights is None else self.weights[0])
        return Metric(self.inputs.mean(0), None if self.weights is None else torch.block_diag(*self.weights))

    def error(self, kernel: Tensor) -> float:
        """The root of E‖y − kernel·x‖² ÷ E‖y‖², outputs weighted as in the metric; 0 answers like the reference."""
        matrix = self._grouped(kernel)
        product = matrix @ self.cross.mT
        answers = matrix @ self.inputs @ matrix.mT - self.damping * (matrix @ matrix.mT)
        rest = self.outputs - product - product.mT + answers
        lost, whole = (self._weighed(moments) for moments in (rest, self.outputs))
        return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0

    def shift(self, kernel: Tensor) -> Tensor | None:
        """The constant (T) that gives the layer's output the reference's mean; None where it has no place."""
        if not self.centred:
            return None
        return (self.mean_y - (self._grouped(kernel) @ self.mean_x[..., None])[..., 0]).flatten()

    def _weighed(self, outputs: Tensor) -> float:
        of_each = outputs.diagonal(dim1=1, dim2=2) if self.weights is None else outputs * self.weights
        return float(of_each.sum())

    def _grouped(self, kernel: Tensor) -> Tensor:
        return kernel.detach().reshape(self.cross.shape).to(self.cross)


class Moments:
    """Sums over rows x (n long), and with `targets` over pairs with rows y that should be answered.

    Each of the `groups` of a layer's channels has rows of its own, and answers with its share of the `targets`.
    """

    def __init__(self, n: int, targets: int | None, device: torch.device, groups: int = 1) -> None:
        zeros = lambda *shape: double(torch.zeros((groups, *shape), device=device))  # noqa: E731
        self.count = 0
        self.x, self.xx = zeros(n), zeros(n, n)
        self._pairs: tuple[Tensor, Tensor, Tensor] | None = None
        if targets is not None:
            t = targets // groups
            self._pairs = zeros(t), zeros(t, n), zeros(t, t)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows x (groups × m × n), and their targets y (m × T).

        Products are taken in the rows' own precision (at least float32) and summed in float64.
        """
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        groups, rows, _ = x.shape
        self.count += rows
        self.x += x.sum(1).to(self.x)
        self.xx += (x.mT @ x).to(self.xx)
        if self._pairs is not None and y is not None:
            y = y.to(x).reshape(rows, groups, -1).transpose(0, 1)
            for total, value in zip(self._pairs, (y.sum(1), y.mT @ x, y.mT @ y), strict=True):
                total += value.to(total)

    def join(self) -> None:
        """Adds up what all processes have seen."""
        self.count = int(processes.summed(torch.tensor(self.count, device=self.x.device)))
        for total in (self.x, self.xx, *(self._pairs or ())):
            processes.summed(total)

    def statistics(
        self, kernel: Tensor, centred: bool, damping: float, sensitivity: Tensor | None = None, images: int = 0
    ) -> Statistics:
        """For a layer with this kernel, whose own outputs are the targets unless there were others. Uses up the sums.

        The damping pulls the best kernel towards the layer's own, so that directions that the images did
        not show stay as they are. `sensitivity` (T × T) weighs the outputs. The rows of one of the `images` resemble
        each other: they count for as many as the geometric mean of rows and images.
        """
        groups, n, _ = self.xx.shape
        matrix = kernel.detach().reshape(groups, -1, n).to(self.xx)
        count = max(self.count, 1)
        # In place, and the sums are used up: of a wide layer each such matrix is hundreds of megabytes.
        mean_x, inputs = self.x / count, self.xx.div_(count)
        if self._pairs is None:
            mean_y, cross = (matrix @ mean_x[..., None])[..., 0], matrix @ inputs
            outputs = cross @ matrix.mT
        else:
            mean_y, cross, outputs = (total / count for total in self._pairs)
        if centred:
            inputs.baddbmm_(mean_x[..., None], mean_x[:, None], alpha=-1)
            cross = cross - mean_y[..., None] * mean_x[:, None]
            outputs = outputs - mean_y[..., None] * mean_y[:, None]
        diagonals = inputs.diagonal(dim1=1, dim2=2)
        size = diagonals.mean(1)[:, None, None]
        # Of fewer rows than this the moments are partly noise, which a best kernel would follow.
        independent = math.sqrt(count * min(images, count)) if images else count
        scarcity = max(0.0, n / independent - 1 / ROWS)
        shift = torch.where(size > 0, (damping + SCARCITY * scarcity) * size, 1.0)
        diagonals.add_(shift[..., 0])
        target = matrix
        if self._pairs is not None and count >= LEAST_ROWS * n:
            target = torch.linalg.solve(inputs, (cross + shift * matrix).mT).mT
        weights = None if sensitivity is None else diagonal_blocks(sensitivity.to(inputs), groups)
        return Statistics(target.flatten(0, 1), centred, mean_x, mean_y, shift, inputs, cross, outputs, weights)
