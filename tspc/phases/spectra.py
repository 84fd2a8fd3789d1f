"""The singular values of each layer's unfoldings, as data; `tspc.pages` draws them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tspc.compression.plan import LayerPlan
from tspc.decompositions import Metric
from tspc.decompositions.function_space import unfolding_spectra


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
    # The values are only drawn, so float32 is enough.
    found = unfolding_spectra(layer.method, kernel.detach().float(), None if metric is None else metric.single())
    cuts = layer.method.cuts(layer.rank)
    return tuple(
        Spectrum(layer.name, layer.method.name, entry, rank, min(cut, len(squares)), _relative(squares))
        for entry, (rank, cut, squares) in enumerate(zip(layer.rank, cuts, found, strict=True))
    )


def _relative(squares: Tensor) -> tuple[float, ...]:
    """Singular values from their squares, relative to the largest."""
    values = squares.sqrt().tolist()
    return tuple(round(value / values[0], 6) if values[0] > 0 else 0.0 for value in values)
