"""The singular values of each layer's unfoldings, as data; `tspc.pages` draws them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tspc.compression.plan import LayerPlan
from tspc.decompositions import Metric, double
from tspc.decompositions.function_space import whitened


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one unfolding of a layer's kernel, relative to the largest.

    The `entry` of the layer's rank belongs to this unfolding; its value is `rank`. At most `kept` of the values can be
    kept. In function space the kernel is whitened first.
    """

    layer: str
    method: str
    entry: int
    rank: int
    kept: int
    values: tuple[float, ...]


def spectra_of(layer: LayerPlan, kernel: Tensor, metric: Metric | None) -> tuple[Spectrum, ...]:
    """One spectrum for every entry of the layer's rank."""
    assert layer.method is not None
    assert layer.rank is not None
    # Without a metric the values are only drawn, so float32 is enough.
    weight = kernel.detach().float() if metric is None else whitened(layer.method, double(kernel.detach()), metric)
    unfoldings, cuts = layer.method.unfoldings(weight), layer.method.cuts(layer.rank)
    return tuple(
        Spectrum(layer.name, layer.method.name, entry, rank, min(cut, *matrix.shape), _singular_values(matrix))
        for entry, (rank, cut, matrix) in enumerate(zip(layer.rank, cuts, unfoldings, strict=True))
    )


def _singular_values(matrix: Tensor) -> tuple[float, ...]:
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    largest = float(values[0])
    return tuple(round(float(v) / largest, 6) if largest > 0 else 0.0 for v in values)
