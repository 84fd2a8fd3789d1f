"""The singular values that a rank cuts off, layer by layer: as data, and as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tspc.decompositions import Metric, double
from tspc.decompositions.function_space import whitened
from tspc.files import write_atomically, write_json
from tspc.plans import LayerPlan

COLUMNS = 6
"""Layers side by side in the picture."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values, relative to the largest, of the unfolding that one entry of a layer's rank cuts at `rank`.

    Of the kernel that was decomposed: in function space, whitened.
    """

    layer: str
    method: str
    entry: int
    rank: int
    values: tuple[float, ...]


def spectra_of(layer: LayerPlan, kernel: Tensor, metric: Metric | None) -> tuple[Spectrum, ...]:
    """One spectrum for every entry of the layer's rank."""
    assert layer.method is not None
    assert layer.rank is not None
    # A picture of the kernels themselves needs no more than float32.
    weight = kernel.detach().float() if metric is None else whitened(layer.method, double(kernel.detach()), metric)
    return tuple(
        Spectrum(layer.name, layer.method.name, entry, rank, _singular_values(matrix))
        for entry, (rank, matrix) in enumerate(zip(layer.rank, layer.method.unfoldings(weight), strict=True))
    )


def _singular_values(matrix: Tensor) -> tuple[float, ...]:
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    largest = float(values[0])
    return tuple(round(float(v) / largest, 6) if largest > 0 else 0.0 for v in values)


def write_spectra(spectra: Sequence[Spectrum], data: Path, picture: Path) -> None:
    """Writes both files, atomically."""
    write_json(data, [dataclasses.asdict(spectrum) for spectrum in spectra])
    write_atomically(picture, lambda path: _draw(spectra, path))


def _draw(spectra: Sequence[Spectrum], path: Path) -> None:
    # The object interface draws without a display, and leaves the user's pyplot alone.
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    layers = list(dict.fromkeys(spectrum.layer for spectrum in spectra))
    columns = max(1, min(COLUMNS, len(layers)))
    rows = max(1, math.ceil(len(layers) / columns))
    figure = Figure(figsize=(2.6 * columns, 2.3 * rows + 0.5))
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, layers, strict=False):
        own = [spectrum for spectrum in spectra if spectrum.layer == name]
        for spectrum in own:
            positions = range(1, len(spectrum.values) + 1)
            (line,) = axes.plot(positions, [max(v, 1e-4) for v in spectrum.values], linewidth=1)
            axes.axvline(spectrum.rank, color=line.get_color(), linestyle="--", linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{name}\n{own[0].method} {', '.join(str(s.rank) for s in own)}", fontsize=7)
        axes.tick_params(labelsize=6)
    figure.suptitle("Singular values, relative to the largest; dashed: the rank chosen", fontsize=9)
    # By hand: the layout engines measure every text, which takes seconds for a large network.
    height = 2.3 * rows + 0.5
    figure.subplots_adjust(left=0.4 / columns, right=0.98, bottom=0.3 / height, top=1 - 0.75 / height, hspace=0.5)
    figure.savefig(path, dpi=110, format="png")
