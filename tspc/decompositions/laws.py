"""The laws of a decomposition as a test class, for the methods of this package and of other packages.

    from tspc.decompositions.laws import DecompositionLaws

    class TestMine(DecompositionLaws):
        method = Mine()

pytest finds the tests by their names; they use only `assert`. A subclass may also change `shapes`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from tspc.decompositions.base import Decomposition
from tspc.decompositions.kernels import Rank, Shape
from tspc.decompositions.metric import Metric
from tspc.errors import DecompositionError

CONVOLUTIONS = ((16, 16, 3, 3), (24, 3, 7, 7), (24, 12, 5, 5), (32, 16, 3, 1), (9, 6, 1, 3), (13, 7, 3, 3))
MATRICES = ((64, 32, 1, 1), (100, 48), (10, 64), (31, 17))

LINEAR = "contract must be linear in each factor; stack the terms of a sum in one factor"


def kernel(shape: Shape, seed: int = 0) -> Tensor:
    """A Gaussian kernel in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int) -> Tensor:
    """Second moments (size × size) of inputs with a falling spectrum."""
    rows = kernel((4 * size, size), seed=1) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class DecompositionLaws:
    """Inherit, and set `method`. Every test uses all `shapes`: (T, S, H, W), or (T, S) for a dense layer."""

    method: Decomposition
    shapes: ClassVar[tuple[Shape, ...]] = (*CONVOLUTIONS, *MATRICES)

    def cases(self) -> list[tuple[Decomposition, Shape, Tensor]]:
        """For every shape: the method that is used for it, the shape, and a kernel."""
        return [(self.method.for_shape(shape), shape, kernel(shape)) for shape in self.shapes]

    def test_full_rank_is_exact(self) -> None:
        for method, shape, k in self.cases():
            factors = method.decompose(k, method.max_rank(shape))
            assert relative(method.reconstruct(factors), k) < 1e-10, shape

    def test_the_rank_fills_the_budget(self) -> None:
        for method, shape, k in self.cases():
            for rate in (0.05, 0.3, 0.9):
                budget = max(method.min_params(shape), math.floor(rate * k.numel()))
                rank = method.rank_for(shape, budget)
                assert method.num_params(shape, rank) <= budget, (shape, rank)
                for larger in method.raised(shape, rank):
                    assert method.num_params(shape, larger) > budget, f"{larger} of {shape} would fit, too"

    def test_factors_have_the_shapes_that_are_counted(self) -> None:
        for method, shape, k in self.cases():
            rank = method.rank_for(shape, k.numel() // 3)
            factors = method.decompose(k, rank)
            assert tuple(tuple(t.shape) for t in factors.tensors) == method.factor_shapes(shape, rank)
            words = math.ceil(method.basis_bytes(shape) / 4)
            assert sum(t.numel() for t in factors.tensors) + words == method.num_params(shape, rank)
            assert 0 < relative(method.reconstruct(factors), k) < 1, (shape, "an approximation, better than nothing")

    def test_the_same_arguments_give_the_same_factors(self) -> None:
        for method, shape, k in self.cases():
            rank = method.rank_for(shape, k.numel() // 4)
            first, second = (method.decompose(k, rank).tensors for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), shape

    def test_the_error_falls_as_the_rank_grows(self) -> None:
        for method, shape, k in self.cases():
            sizes = [max(method.min_params(shape), int(k.numel() * rate)) for rate in (0.05, 0.2, 0.5, 1.0)]
            errors = [
                relative(method.reconstruct(method.decompose(k, method.rank_for(shape, size))), k) for size in sizes
            ]
            assert errors == sorted(errors, reverse=True), shape

    def test_a_kernel_of_zeros(self) -> None:
        for method, shape, k in self.cases():
            factors = method.decompose(torch.zeros(shape), method.rank_for(shape, k.numel() // 2))
            assert torch.equal(method.reconstruct(factors), torch.zeros(shape)), shape

    def test_a_kernel_of_rank_one_is_met_at_rank_one(self) -> None:
        # Ones over the channels are of rank one however the channels are split.
        h, w = kernel((3,), 1), kernel((3,), 2)
        k = torch.ones(8, 4, 1, 1, dtype=h.dtype) * h[:, None] * w
        rank = tuple(1 for _ in self.method.max_rank((8, 4, 3, 3)))
        assert relative(self.method.reconstruct(self.method.decompose(k, rank)), k) < 1e-6

    def test_dtype_and_gradient(self) -> None:
        for method, shape, k in self.cases():
            factors = method.decompose(k.float(), method.rank_for(shape, k.numel() // 2))
            assert all(t.dtype == torch.float32 for t in factors.tensors)
            leaves = [t.requires_grad_() for t in factors.tensors]
            method.reconstruct(factors).sum().backward()
            assert all(leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()) for leaf in leaves), shape

    def test_what_cannot_be_decomposed_is_refused(self) -> None:
        for method, shape, k in self.cases():
            top = method.max_rank(shape)
            for bad in (math.nan, math.inf):
                broken = k.clone()
                broken.view(-1)[0] = bad
                assert "NaN or infinite" in self._refusal(method, broken, method.rank_for(shape, k.numel() // 2))
            for rank in (tuple(0 for _ in top), tuple(r + 1 for r in top), (*top, 1)):
                assert "does not fit" in self._refusal(method, k, rank)

    def _refusal(self, method: Decomposition, weight: Tensor, rank: Rank) -> str:
        try:
            method.decompose(weight, rank)
        except DecompositionError as error:
            return str(error)
        raise AssertionError(f"{method.name} took rank {rank} of {tuple(weight.shape)}")

    def test_axes_tell_where_the_modes_are(self) -> None:
        """If the modes of the factors are multiplied by matrices, so are the modes of the kernel."""
        for method, shape, k in self.cases():
            axes, metric = (
                method.axes(shape),
                Metric(covariance(k[0].numel()), torch.diag(1 + torch.arange(len(k)) / 7.0).double()),
            )
            roots = metric.roots(axes)
            factors = method.decompose(k, method.rank_for(shape, k.numel() // 2))
            white = roots.whiten_factors(method.tensors_of(factors), axes)
            wanted = roots.whiten(method.reconstruct(factors))
            assert relative(method.contract(white, shape), wanted) < 1e-9, (shape, LINEAR)

    def test_the_unfoldings_keep_no_more_singular_values_than_the_cuts(self) -> None:
        for method, shape, k in self.cases():
            rank = method.rank_for(shape, k.numel() // 3)
            found = method.unfoldings(method.reconstruct(method.decompose(k, rank)))
            for matrix, most in zip(found, method.cuts(rank), strict=True):
                values = torch.linalg.svdvals(matrix)
                assert int((values > 1e-9 * values[0]).sum()) <= most, f"rank {rank} of {shape} keeps more than `cuts`"

    def test_in_function_space_it_is_never_worse(self) -> None:
        for method, shape, k in self.cases():
            metric = Metric(covariance(k[0].numel()))
            rank = method.rank_for(shape, k.numel() // 3)
            plain, fitted = (
                metric.squared((k - method.reconstruct(method.decompose(k, rank, m))).flatten(1))
                for m in (None, metric)
            )
            assert fitted <= plain * (1 + 1e-9), shape

    def test_it_is_linear_in_every_factor(self) -> None:
        for method, shape, k in self.cases():
            tensors = list(method.tensors_of(method.decompose(k, method.rank_for(shape, k.numel() // 3))))
            whole = method.contract(tensors, shape)
            for i, tensor in enumerate(tensors):
                doubled = method.contract([*tensors[:i], 2 * tensor, *tensors[i + 1 :]], shape)
                assert relative(doubled, 2 * whole) < 1e-9, (shape, i, LINEAR)
