"""Error curves without images: they follow from spectra and at most one fit, and are close to fits at all sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tspc.compression import curve_sizes as module
from tspc.compression.curves import error_curves
from tspc.compression.error_curve import ErrorCurve
from tspc.compression.outline import outline
from tspc.compression.settings import PlanSettings
from tspc.decompositions import (
    METHODS,
    SVD,
    Auto,
    Decomposition,
    Factors,
    Method,
    TensorTrain,
    Tucker,
    laws,
    linalg,
    resolve,
)

SIZES = (0.04, 0.1, 0.3, 0.5)


def trained(t: int, s: int, h: int, w: int) -> torch.Tensor:
    """A kernel whose spectrum falls slowly over the channels, and little over the positions."""
    x = laws.kernel((t, s, h, w)) * torch.arange(1, t + 1).view(-1, 1, 1, 1) ** -0.5
    x *= torch.arange(1, s + 1).view(-1, 1, 1) ** -0.5 * torch.linspace(1, 0.5, h)[:, None] * torch.linspace(1, 0.5, w)
    return x.float()


def curves(kernel: torch.Tensor, method: str | Method) -> list[ErrorCurve]:
    t, s, h, w = kernel.shape
    layer = nn.Conv2d(s, t, (h, w), bias=False)
    layer.weight.data = kernel
    model, settings = nn.Sequential(layer), PlanSettings.of(method, keep_first=False, keep_last=False, min_params=0)
    return error_curves(model, outline(model, settings).layers, resolve(method))["0"]


def true_errors(kernel: torch.Tensor, method: Decomposition) -> dict[int, float]:
    """Size → squared relative error of a fit."""
    shape = tuple(kernel.shape)
    ranks = [method.rank_for(shape, max(int(share * kernel.numel()), method.min_params(shape))) for share in SIZES]
    return {
        method.num_params(shape, rank): float(
            (kernel - method.reconstruct(method.decompose(kernel, rank))).square().sum() / kernel.square().sum()
        )
        for rank in ranks
    }


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ranks that are fitted from now on."""
    ranks = list[tuple[int, ...]]()
    decompose = Decomposition.decompose

    def noted(self: Decomposition, *given: object) -> Factors:
        ranks.append(given[1])  # type: ignore[arg-type]
        return decompose(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Decomposition, "decompose", noted)
    return ranks


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("is_small", [True, False])
def test_a_curve_of_a_convolution_is_close_to_quick_fits(name, is_small, monkeypatch):
    if not is_small:
        monkeypatch.setattr(module, "SMALL", 0)
    kernel = trained(48, 32, 3, 3)
    method = METHODS[name]()
    expected = true_errors(kernel, method.sketch())
    ranks = counted(monkeypatch)
    (curve,) = curves(kernel, name)
    assert len(ranks) == (0 if method.is_spectral else 4 if is_small else 1)
    assert list(curve.squared_errors) == sorted(curve.squared_errors, reverse=True)
    for size, error in expected.items():
        assert abs(math.log(curve.at(size) / error)) < 0.45, (size, curve.at(size), error)


@pytest.mark.parametrize("name", ["svd", "rcp", "tt"])
def test_a_curve_of_a_matrix_needs_no_fit(name, monkeypatch):
    kernel = trained(48, 32, 1, 1)
    expected = true_errors(kernel, METHODS[name]().for_shape(tuple(kernel.shape)))
    ranks = counted(monkeypatch)
    (curve,) = curves(kernel, name)
    assert ranks == []
    sampled = {size: error for size, error in expected.items() if size in curve.params}
    assert sampled
    for size, error in sampled.items():
        assert curve.at(size) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_kernel_of_zeros_has_no_error(name):
    (curve,) = curves(torch.zeros(8, 6, 3, 3), name)
    assert max(curve.squared_errors) < 1e-9


def test_methods_share_the_spectra_of_the_same_unfolding(monkeypatch):
    """`svd` cuts the middle of `tt`, `tk` its ends; `rtt` has other modes."""
    sizes = []
    eigenvalues = linalg.eigenvalues
    monkeypatch.setattr(linalg, "eigenvalues", lambda gram: sizes.append(len(gram)) or eigenvalues(gram))
    kernel = trained(24, 20, 3, 3)
    t, s = 24, 20
    alone = []
    for name in ("svd", "tk", "tt"):
        sizes.clear()
        curves(kernel, name)
        alone.append(list(sizes))
    assert alone == [[3 * s], [s, t], [s, 3 * s, t]]
    sizes.clear()
    method = Auto((SVD(), Tucker(), TensorTrain()))
    found = curves(kernel, method)
    assert sorted(sizes) == [s, t, 3 * s]
    for curve, name in zip(found, ("svd", "tk", "tt"), strict=True):
        assert curve.squared_errors == pytest.approx(curves(kernel, name)[0].squared_errors, rel=1e-4)
