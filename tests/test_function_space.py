"""Decomposition in function space: never worse than the plain solution, for every method and every kind of Σ."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from tspc.decompositions import METHODS, SVD, Decomposition, Metric, function_space
from tspc.decompositions.dense import Dense
from tspc.decompositions.function_space import refine, spectra

SHAPES = [(12, 10, 3, 3), (8, 6, 3, 1), (14, 12, 1, 1), (20, 15)]

each_method = pytest.mark.parametrize("name", METHODS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel_and_size(name: str, shape: tuple[int, ...]) -> tuple[Decomposition, torch.Tensor, int]:
    k = normal(*shape)
    return METHODS[name]().for_shape(shape), k, k[0].numel()


def covariance(n: int, kind: str) -> torch.Tensor:
    """A Σ with a falling spectrum; `singular` has half of the directions, `dead` an input that is always zero,
    `one` has a single direction."""
    rows = {"full": 4 * n, "singular": n // 2, "dead": 4 * n, "one": 1}[kind]
    x = normal(rows, n, seed=1) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    if kind == "dead":
        x[:, n // 3] = 0
    return x.T @ x / rows


def error(method: Decomposition, kernel: torch.Tensor, rank: tuple[int, ...], metric: Metric, fitted: bool) -> float:
    factors = method.decompose(kernel, rank, metric if fitted else None)
    difference = (kernel - method.reconstruct(factors)).flatten(1)
    return math.sqrt(metric.squared(difference) / metric.squared(kernel.flatten(1)))


OTHERS = ("singular", "dead", "one")
KINDS = [
    (name, shape, kind)
    for (i, name), (j, shape) in product(enumerate(METHODS), enumerate(SHAPES))
    for kind in ("full", OTHERS[(i + j) % 3])
]
"""Every method and shape with a full Σ, and with one of the other kinds, which meet all methods and all shapes."""


@pytest.mark.parametrize(("name", "shape", "kind"), KINDS, ids=str)
def test_never_worse_than_the_plain_solution(name, shape, kind):
    method, k, n = kernel_and_size(name, shape)
    metric = Metric(covariance(n, kind) + 1e-9 * torch.eye(n, dtype=k.dtype))
    rank = method.rank_for(shape, k.numel() // 3)
    fitted, plain = (error(method, k, rank, metric, is_fitted) for is_fitted in (True, False))
    assert math.isfinite(fitted)
    assert fitted <= plain * (1 + 1e-9)
    if kind == "full":
        assert fitted < 0.9 * plain, "a real gain where Σ is far from the identity"


@each_method
@pytest.mark.parametrize("seed", range(4))
def test_a_kernel_that_the_metric_does_not_see(name, seed):
    """A norm over the outputs takes their size away: the network's answer does not depend on the kernel's size."""
    shape = (12, 3)
    k = normal(12, 1, seed=seed) @ normal(1, 3, seed=seed + 9)
    direction = k[:, :1] / k[:, :1].norm()
    metric = Metric(covariance(3, "full"), torch.eye(12, dtype=k.dtype) - direction @ direction.T)
    assert 0 <= metric.squared(k) < 1e-12
    method = METHODS[name]().for_shape(shape)
    factors = method.decompose(k, method.rank_for(shape, 20), metric)
    assert all(tensor.isfinite().all() for tensor in factors.tensors)


@each_method
def test_outputs_can_be_weighted(name):
    shape = (12, 10, 3, 3)
    method, k, n = kernel_and_size(name, shape)
    important = torch.diag(torch.logspace(0, -3, 12, dtype=k.dtype))
    metric = Metric(covariance(n, "full"), important)
    rank = method.rank_for(shape, k.numel() // 3)
    assert error(method, k, rank, metric, True) < error(method, k, rank, metric, False)


@each_method
def test_error_falls_as_the_rank_grows(name):
    shape = (12, 10, 3, 3)
    method, k, n = kernel_and_size(name, shape)
    metric = Metric(covariance(n, "full"))
    ranks = [method.rank_for(shape, int(k.numel() * rate)) for rate in (0.1, 0.2, 0.4, 0.8)]
    errors = [error(method, k, rank, metric, True) for rank in ranks]
    assert errors == sorted(errors, reverse=True)


@each_method
def test_refining_in_subspaces_is_nearly_as_good(name, monkeypatch):
    shape = (40, 36, 3, 3)
    method, k, n = kernel_and_size(name, shape)
    metric = Metric(covariance(n, "full"), torch.diag(torch.linspace(1, 3, 40, dtype=k.dtype)))
    rank = method.rank_for(shape, k.numel() // 20)
    whole, plain = (error(method, k, rank, metric, is_fitted) for is_fitted in (True, False))
    monkeypatch.setattr(function_space, "SMALL", 0)
    inside = error(method, k, rank, metric, True)
    assert inside <= plain * (1 + 1e-9)
    assert inside <= 1.02 * whole


@each_method
@pytest.mark.parametrize("shape", [(12, 1, 1, 5), (12, 1, 5, 1), (1, 10, 3, 3), (9, 1, 3, 3), (6, 1)], ids=str)
def test_kernels_with_a_single_channel(name, shape):
    method, k, n = kernel_and_size(name, shape)
    metric = Metric(covariance(n, "full"))
    rank = method.rank_for(shape, max(k.numel() // 2, method.min_params(shape)))
    fitted, plain = (error(method, k, rank, metric, is_fitted) for is_fitted in (True, False))
    assert fitted <= plain * (1 + 1e-9) + 1e-12
    assert len(spectra(method, k, metric)) == len(rank)


@each_method
@each_shape
def test_full_rank_is_exact(name, shape):
    method, k, n = kernel_and_size(name, shape)
    assert error(method, k, method.max_rank(shape), Metric(covariance(n, "full")), True) < 1e-6


@pytest.mark.parametrize("shape", [(14, 12, 1, 1), (20, 15)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_matrix_gets_the_optimum(shape, weighted):
    """The squared error left is the sum of the smallest eigenvalues of G^½ W Σ Wᵀ G^½."""
    k, rank = normal(*shape), (5,)
    sigma = covariance(k[0].numel(), "full")
    b = normal(len(k), len(k), seed=3)
    outputs = b @ b.T if weighted else None
    metric = Metric(sigma, outputs)
    rebuilt = SVD().reconstruct(SVD().decompose(k, rank, metric))
    matrix = k.flatten(1)
    whole = matrix @ sigma @ matrix.T
    values = torch.linalg.eigvals(whole if outputs is None else outputs @ whole).real.sort().values
    assert metric.squared((k - rebuilt).flatten(1)) == pytest.approx(float(values[: len(k) - 5].sum()), rel=1e-6)


@each_method
@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (12, 8)])
def test_zero_kernel(name, shape):
    method, _, n = kernel_and_size(name, shape)
    factors = method.decompose(torch.zeros(shape), method.rank_for(shape, 60), Metric(covariance(n, "full")))
    assert torch.equal(method.reconstruct(factors), torch.zeros(shape))


@each_method
@each_shape
def test_whitening_factors_whitens_the_kernel(name, shape):
    method, k, n = kernel_and_size(name, shape)
    metric = Metric(covariance(n, "full"), torch.diag(torch.linspace(1, 2, len(k), dtype=k.dtype)))
    axes = method.axes(shape)
    roots = metric.roots(axes)
    factors = method.decompose(k, method.rank_for(shape, k.numel() // 2))
    rebuilt = method.reconstruct(factors)
    white = roots.whiten_factors(method.tensors_of(factors), axes)
    torch.testing.assert_close(method.contract(white, shape), roots.whiten(rebuilt))
    torch.testing.assert_close(method.contract(roots.unwhiten_factors(white, axes), shape), rebuilt)
    assert roots.whitened(metric, {}).squared(roots.whiten(k).flatten(1)) == pytest.approx(metric.squared(k.flatten(1)))


@torch.no_grad()
def test_refining_finds_an_exact_fit_and_needs_no_gradient_mode():
    left, right = normal(9, 3, seed=5), normal(3, 7, seed=6)
    start = [normal(9, 3, seed=7), normal(3, 7, seed=8)]
    metric = Metric(covariance(7, "full"))
    found = refine(lambda t: t[0] @ t[1], start, left @ right, metric, steps=60)
    before, after = (metric.squared(left @ right - t[0] @ t[1]) for t in (start, found))
    assert after < 1e-3 * before
    assert all(not t.requires_grad for t in found)


@each_method
def test_the_scale_of_a_kernel_does_not_matter(name):
    method, k, n = kernel_and_size(name, (12, 8, 3, 3))
    metric = Metric(covariance(n, "full"))
    rank = method.rank_for(k.shape, k.numel() // 4)
    errors = [
        metric.squared((s * k - method.reconstruct(method.decompose(s * k, rank, metric))).flatten(1)) / s**2
        for s in (1.0, 1e-6)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


def test_the_kernel_itself_is_exact_in_any_norm() -> None:
    kernel = normal(30, 20).float()
    metric = Metric(covariance(20, "singular").float(), torch.rand(30))
    assert torch.equal(Dense().decompose(kernel, (), metric).tensors[0], kernel)


def test_a_subspace_of_weighted_outputs() -> None:
    """The weights of the outputs are a diagonal or its matrix; in a subspace both give the same norm."""
    axes = METHODS["tt"]().axes((40, 6))
    weights, basis = torch.rand(40, dtype=torch.float64) + 0.1, torch.linalg.qr(normal(40, 5)).Q
    inputs = covariance(6, "full")
    plain = Metric(inputs, weights.diag())
    roots = Metric(inputs, weights).roots(axes)
    found, wanted = (roots.whitened(metric, {"t": basis}).outputs for metric in (Metric(inputs, weights), plain))
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found, wanted)


def test_many_outputs_need_no_square_matrix() -> None:
    """200,000 tokens: their matrix would take 160 GB."""
    shape = 200_000, 8, 3, 1
    kernel = normal(*shape).float()
    metric = Metric(covariance(24, "full").float(), torch.rand(shape[0])).sketch()
    for name, rank in {"tk": (4, 4), "cp": (4,), "svd": (4,)}.items():
        method = METHODS[name]().for_shape(shape)
        factors = method.decompose(kernel, rank, metric)
        lost = metric.squared((kernel - method.reconstruct(factors)).flatten(1))
        assert lost < metric.squared(kernel.flatten(1))
