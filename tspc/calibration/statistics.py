"""The statistics of a layer's inputs and wanted outputs, and the error of a kernel under them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from tspc.decompositions import Metric

SMALL = 1e-3
"""A squared relative error below this needs float64: it is a difference of sums near to each other."""


def metric_of(inputs: Tensor, weights: Tensor | None) -> Metric:
    """The one norm for the kernels of all groups, from fields of `Statistics`."""
    if weights is None:
        outputs = None
    elif weights.ndim == 2:
        outputs = weights.flatten()
    else:
        outputs = weights[0] if len(weights) == 1 else torch.block_diag(*weights)
    return Metric(inputs[0] if len(inputs) == 1 else inputs.mean(0), outputs)


@dataclass(frozen=True)
class Statistics:
    """The statistics of a layer's inputs x and wanted outputs y, which are the reference's outputs without bias.

    With `centred`, a constant can be added to the layer's output. The means are then subtracted from all second
    moments. `target` is the best kernel (T × n) from x to y. The other fields have an entry for each group of the
    layer's channels: g groups with t = T/g outputs each, and g = 1 for most layers.

    - `mean_x` (g × n), `mean_y` (g × t);
    - `inputs`: E[xxᵀ] + `damping`·I (g × n × n; `damping` is g × 1 × 1);
    - `cross`: E[yxᵀ] (g × t × n);
    - `outputs`: E[yyᵀ] (g × t × t);
    - `weights`: how much the outputs matter (g × t × t; None: all the same).

    For a layer with more than `products.WIDEST_OUTPUT` outputs the last two are diagonals (g × t). The kernels of all
    groups are decomposed as one tensor, so they are fitted in one norm, `metric`, from the mean of the groups' inputs.
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
        return metric_of(self.inputs, self.weights)

    def error(self, kernel: Tensor) -> float:
        """The root of E‖y − kernel·x‖² ÷ E‖y‖², with outputs weighted as in the metric; 0: equal to the reference."""
        size = self._weighted(self.outputs)
        if not size > 0:
            return 0.0
        quick = self._lost(kernel, torch.float32) / size
        return math.sqrt(quick if quick > SMALL else max(self._lost(kernel, self.inputs.dtype) / size, 0.0))

    def _lost(self, kernel: Tensor, dtype: torch.dtype) -> float:
        """E‖y − kernel·x‖²; its products are taken in this precision, and its sums in that of the statistics."""
        matrix, whole = self._grouped(kernel), self.outputs
        inner, cross = self._inputs_as(dtype), self.cross
        product = (matrix.to(dtype) @ inner).to(whole) - self.damping * matrix
        if self.weights is None or self.weights.ndim == 2:
            whole = whole if whole.ndim == 2 else whole.diagonal(dim1=1, dim2=2)
            return self._weighted(whole + (matrix * (product - 2 * cross)).sum(2))
        # tr(G(product − 2·cross)Kᵀ), because G is symmetric.
        return self._weighted(whole) + float(((self.weights @ matrix) * (product - 2 * cross)).sum())

    def _inputs_as(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.inputs.dtype:
            return self.inputs
        # With one group the metric holds this, too.
        return cast(Tensor, self.metric.single().inputs)[None] if len(self.inputs) == 1 else self.inputs.to(dtype)

    def _weighted(self, outputs: Tensor) -> float:
        """Products of the outputs, summed with their weights."""
        if self.weights is None:
            outputs = outputs if outputs.ndim == 2 else outputs.diagonal(dim1=1, dim2=2)
            return float(outputs.sum())
        return float((outputs * self.weights).sum())

    def shift(self, kernel: Tensor) -> Tensor | None:
        """The constant (T) that gives the layer's output the reference's mean; None if it cannot be added."""
        if not self.centred:
            return None
        return (self.mean_y - (self._grouped(kernel) @ self.mean_x[..., None])[..., 0]).flatten()

    def _grouped(self, kernel: Tensor) -> Tensor:
        return kernel.detach().reshape(self.cross.shape).to(self.cross)
