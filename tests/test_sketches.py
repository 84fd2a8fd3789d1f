"""Layers whose second moments would be too large: a few rows stand for their inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tspc
from tspc.calibration import gathering
from tspc.calibration.samples import Calibration, Samples
from tspc.calibration.sketches import sketches_of
from tspc.decompositions import METHODS, SVD, Metric, function_space
from tspc.decompositions.metric import Rows


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(n: int) -> torch.Tensor:
    return normal(40, n, seed=1) * torch.logspace(0, -1.5, n, dtype=torch.float64) / math.sqrt(40)


def both(n: int, outputs: torch.Tensor | None = None) -> tuple[Metric, Metric]:
    x = rows(n)
    return Metric(Rows(x, 0.01), outputs), Metric(x.T @ x + 0.01 * torch.eye(n, dtype=x.dtype), outputs)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_and_their_second_moments_are_the_same_norm(weighted):
    k = normal(12, 30)
    few, whole = both(30, torch.linspace(0.5, 2, 12, dtype=k.dtype).diag() if weighted else None)
    torch.testing.assert_close(few.apply(k), whole.apply(k))
    fits = [SVD().reconstruct(SVD().decompose(k, (5,), metric)) for metric in (few, whole)]
    torch.testing.assert_close(*fits)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_fitted_in_the_norm_of_rows(name):
    k = normal(12, 10, 3, 3)
    method = METHODS[name]().for_shape(tuple(k.shape))
    few, whole = both(90)
    rank = method.rank_for(tuple(k.shape), k.numel() // 3)
    axes = method.axes(tuple(k.shape))
    torch.testing.assert_close(few.roots(axes).whiten(k), whole.roots(axes).whiten(k))
    fitted, plain = (
        whole.squared((k - method.reconstruct(method.decompose(k, rank, m))).flatten(1)) for m in (few, None)
    )
    assert fitted <= plain * (1 + 1e-9)


def test_a_wide_layer_is_fitted_to_its_inputs(monkeypatch):
    monkeypatch.setattr(gathering, "WIDEST", 16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    x = torch.randn(200, 12) * torch.logspace(0, -2, 12)
    settings = Calibration(samples=200, sensitivity=False, damping=1e-4)
    with Samples(x, settings) as samples:
        survey = samples.survey(model, ["0", "2"])
        ((name, sketch),) = sketches_of(model, ["2"], samples, survey)
        hidden = model[:2](x).double()
        wanted = hidden.T @ hidden / len(x)
        assert isinstance(sketch.metric.inputs, Rows)
        found = sketch.metric.inputs.rows
        torch.testing.assert_close((found.T @ found).double(), wanted, rtol=1e-4, atol=1e-6)
    names = [[], []]
    small = tspc.compress(model, "svd", 0.3, calibration=x, settings=settings, on_layer=names[0].append)
    plain = tspc.compress(model, "svd", 0.3, on_layer=names[1].append)
    assert name == "2"
    assert names[0].count("2") == 2
    with torch.no_grad():
        errors = [float((m(x) - model(x)).square().mean()) for m in (small, plain)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["svd", "rtt"])
def test_wide_layers_of_any_shape_and_precision(method, dtype, monkeypatch):
    """Also with more outputs than inputs, and where a later operation changes the layer's input in place."""
    monkeypatch.setattr(gathering, "WIDEST", 8)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(48, 16)

        def forward(self, x):
            x = self.first(x).relu()
            h = self.up(x)
            x += 1
            return self.down(h.relu())

    torch.manual_seed(0)
    model, x = Net().to(dtype).eval(), torch.randn(64, 8).to(dtype)
    small = tspc.compress(model, method, 0.5, calibration=x, keep_last=False, settings=Calibration(sensitivity=False))
    with torch.no_grad():
        wanted, found = model(x.clone()).float(), small(x.clone()).float()
    assert found.isfinite().all()
    assert float((found - wanted).norm() / wanted.norm()) < 0.8


@pytest.mark.parametrize("name", ["cp", "tk", "tt", "rtt"])
@pytest.mark.parametrize("projects", [False, True])
def test_a_norm_given_by_rows_is_refined_in_like_the_whole_one(monkeypatch, name, projects):
    monkeypatch.setattr(function_space, "SMALL", 0 if projects else 1e8)
    k, method = normal(24, 16, 3, 3), METHODS[name]()
    rank = method.rank_for((24, 16, 3, 3), 600)
    few, whole = both(144, torch.linspace(0.5, 2, 24, dtype=k.dtype).diag())
    losses = [whole.squared((k - method.reconstruct(method.decompose(k, rank, m))).flatten(1)) for m in (few, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    monkeypatch.setattr(function_space, "FULL", (0, 0, 0))
    start = method.reconstruct(method.decompose(k, rank, few))
    assert losses[0] < 0.99 * whole.squared((k - start).flatten(1)), "refined"
