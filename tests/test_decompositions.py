"""The laws of `Decomposition`, over all methods and shapes, in float64; tensorly as the oracle."""

from __future__ import annotations

import math

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker, tensor_train

from tspc import decompositions
from tspc.decompositions import CP, METHODS, SVD, Decomposition, Tucker, from_dict
from tspc.decompositions.als import khatri_rao
from tspc.decompositions.cp import CPFormat
from tspc.decompositions.reshaped import Reshaped, balanced_factors
from tspc.decompositions.tensor_train import TensorTrainFormat
from tspc.decompositions.tucker import TuckerFormat
from tspc.errors import ConfigError, DecompositionError

SHAPES = [
    (16, 16, 3, 3),
    (64, 3, 7, 7),
    (96, 48, 5, 5),
    (64, 32, 1, 1),
    (32, 16, 3, 1),
    (9, 6, 1, 3),
    (13, 7, 3, 3),
    (1000, 2048),
    (10, 64),
    (31, 17),
]


def kernel(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


each_method = pytest.mark.parametrize("name", METHODS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def method_for(name: str, shape: tuple[int, ...]) -> Decomposition:
    return METHODS[name]().for_shape(shape)


@each_method
@each_shape
def test_full_rank_is_exact(name, shape):
    method, k = method_for(name, shape), kernel(shape)
    factors = method.decompose(k, method.max_rank(shape))
    assert relative(method.reconstruct(factors), k) < 1e-10


@each_method
@each_shape
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_rank_fills_the_budget(name, shape, rate):
    method = method_for(name, shape)
    budget = max(method.min_params(shape), math.floor(rate * math.prod(shape)))
    rank = method.rank_for(shape, budget)
    assert method.num_params(shape, rank) <= budget
    for i, (r, top) in enumerate(zip(rank, method.max_rank(shape), strict=True)):
        larger = (*rank[:i], r + 1, *rank[i + 1 :])
        fits = r < top and method.num_params(shape, larger) <= budget
        assert not (fits and method.is_useful(shape, larger)), f"{larger} would fit too"


@each_method
@each_shape
def test_factors_have_the_shapes_that_are_counted(name, shape):
    method, k = method_for(name, shape), kernel(shape)
    rank = method.rank_for(shape, math.prod(shape) // 3)
    factors = method.decompose(k, rank)
    assert tuple(tuple(t.shape) for t in factors.tensors) == method.factor_shapes(shape, rank)
    assert sum(t.numel() for t in factors.tensors) == method.num_params(shape, rank)
    error = relative(method.reconstruct(factors), k)
    assert 0 < error < 1, "an approximation, better than nothing"


@each_method
@pytest.mark.parametrize("shape", [(16, 12, 3, 3), (20, 30)])
def test_same_seed_same_factors(name, shape):
    method, k = method_for(name, shape), kernel(shape)
    rank = method.rank_for(shape, k.numel() // 4)
    first, second = (method.decompose(k, rank).tensors for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_method
def test_error_falls_as_the_rank_grows(name):
    shape = (24, 16, 3, 3)
    method, k = method_for(name, shape), kernel(shape)
    errors = [
        relative(method.reconstruct(method.decompose(k, method.rank_for(shape, int(k.numel() * rate)))), k)
        for rate in (0.05, 0.2, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


@each_method
@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (12, 8)])
def test_zero_kernel(name, shape):
    method = method_for(name, shape)
    factors = method.decompose(torch.zeros(shape), method.rank_for(shape, 60))
    assert torch.equal(method.reconstruct(factors), torch.zeros(shape))


@each_method
def test_a_rank_one_kernel_is_met_at_rank_one(name):
    t, s, h, w = (torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (8, 4, 3, 3))
    k = torch.einsum("t,s,h,w->tshw", t, s, h, w)
    # A rank-one kernel is separable in every mode; the channel vectors must be so too for the reshaped ones.
    k = torch.einsum("a,b,c,s,h,w->abcshw", *(t[:2], t[2:4], t[4:6], s, h, w)).reshape(8, 4, 3, 3)
    k = k[:, :1] * torch.ones(1, 4, 1, 1, dtype=k.dtype)
    method = METHODS[name]()
    factors = method.decompose(k, tuple(1 for _ in method.max_rank((8, 4, 3, 3))))
    assert relative(method.reconstruct(factors), k) < 1e-6


@each_method
def test_dtype_and_gradient(name):
    shape = (8, 6, 3, 3)
    method = METHODS[name]()
    factors = method.decompose(kernel(shape).float(), method.rank_for(shape, 200))
    assert all(t.dtype == torch.float32 for t in factors.tensors)
    leaves = [t.requires_grad_() for t in factors.tensors]
    method.reconstruct(factors).sum().backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_kernels_are_refused(bad):
    k = kernel((8, 6, 3, 3))
    k[0, 0, 0, 0] = bad
    with pytest.raises(DecompositionError, match="NaN or infinite"):
        SVD().decompose(k, (2,))


@pytest.mark.parametrize("rank", [(0,), (19,), (1, 1)])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(DecompositionError, match="rank .* does not fit svd"):
        SVD().decompose(kernel((8, 6, 3, 3)), rank)


@pytest.mark.parametrize(
    ("name", "rank"), [("tk", (1, 9)), ("tt", (1, 4, 1)), ("rtk", (1, 1, 1, 4)), ("rtt", (1, 5, 2))]
)
def test_ranks_that_their_neighbours_cannot_carry_are_refused(name, rank):
    shape = (16, 6, 2, 1)
    with pytest.raises(DecompositionError, match="exceeds what the others can carry"):
        METHODS[name]().decompose(kernel(shape), rank)


def test_budget_below_rank_one_is_refused():
    with pytest.raises(DecompositionError, match="needs at least 42 parameters, but the budget is 41"):
        SVD().rank_for((8, 6, 3, 3), 41)


def test_kernels_of_other_dimensions_are_refused():
    with pytest.raises(DecompositionError, match="expected"):
        SVD().max_rank((8, 6, 3))


@pytest.mark.parametrize("name", ["cp", "tk", "tt"])
@pytest.mark.parametrize("shape", [(64, 32, 1, 1), (10, 64)])
def test_without_spatial_extent_it_is_svd(name, shape):
    assert METHODS[name]().for_shape(shape) == SVD()


@pytest.mark.parametrize(
    ("number", "count", "expected"),
    [
        (64, 2, (8, 8)),
        (64, 3, (4, 4, 4)),
        (96, 2, (8, 12)),
        (7, 2, (1, 7)),
        (10, 3, (1, 2, 5)),
        (1000, 3, (10, 10, 10)),
        (1, 3, (1, 1, 1)),
        (768, 2, (24, 32)),
        (2048, 3, (8, 16, 16)),
    ],
)
def test_balanced_factors(number, count, expected):
    assert balanced_factors(number, count) == expected


@pytest.mark.parametrize("number", range(1, 200))
@pytest.mark.parametrize("count", [2, 3, 4])
def test_balanced_factors_multiply_back(number, count):
    assert math.prod(balanced_factors(number, count)) == number


def test_reshaped_parameter_formulas():
    """Table of arXiv:1805.10352: rcp R(S1T1 + S2T2 + HW), rtt Σ S_l T_l R_{l-1} R_l + R_m HW."""
    assert METHODS["rcp"]().num_params((16, 16, 3, 3), (5,)) == 5 * (16 + 16 + 9)
    assert METHODS["rtt"]().num_params((64, 64, 3, 3), (2, 3, 4)) == 16 * 2 + 16 * 6 + 16 * 12 + 4 * 9
    assert METHODS["rtk"]().num_params((16, 16, 3, 3), (2, 3, 2, 3)) == 4 * (2 + 3 + 2 + 3) + 36 * 9


def test_khatri_rao_is_columnwise_kronecker():
    a, b = kernel((3, 4)), kernel((5, 4), 1)
    expected = torch.stack([torch.kron(a[:, i], b[:, i]) for i in range(4)], dim=1)
    assert torch.equal(khatri_rao([a, b]), expected)


# --- tensorly as the oracle: our error is no worse than its own -------------------------------------------------


@pytest.fixture
def pytorch_backend():
    with tensorly.backend_context("pytorch"):
        yield


def decaying(*shape: int) -> torch.Tensor:
    """A tensor with a falling spectrum in every mode, as trained kernels have."""
    x = kernel(shape)
    for mode, n in enumerate(shape):
        weights = torch.arange(1, n + 1, dtype=x.dtype) ** -0.7
        x = x * weights.view([-1 if m == mode else 1 for m in range(len(shape))])
    return x


@pytest.mark.usefixtures("pytorch_backend")
def test_tucker_against_tensorly():
    x = decaying(24, 20, 9)
    ours = TuckerFormat(10, 1e-6)
    (core, matrices), _ = partial_tucker(x, rank=[7, 6], modes=[0, 1], init="svd", tol=1e-8)
    theirs = tensorly.tenalg.multi_mode_dot(core, matrices, modes=[0, 1])
    assert relative(ours.contract(ours.fit(x, (7, 6))), x) <= 1.001 * relative(theirs, x)


@pytest.mark.usefixtures("pytorch_backend")
def test_tensor_train_against_tensorly():
    x = decaying(12, 5, 5, 14)
    ours = TensorTrainFormat()
    theirs = tensorly.tt_to_tensor(tensor_train(x, rank=[1, 6, 9, 7, 1]))
    assert relative(ours.contract(ours.fit(x, (6, 9, 7))), x) <= 1.001 * relative(theirs, x)


@pytest.mark.usefixtures("pytorch_backend")
def test_cp_against_tensorly():
    x = decaying(24, 9, 20)
    ours = CPFormat(200, 1e-6, restarts=3)
    theirs = tensorly.cp_to_tensor(parafac(x, rank=8, n_iter_max=200, init="svd", tol=1e-8))
    assert relative(ours.contract(ours.fit(x, (8,))), x) <= 1.02 * relative(theirs, x)


def test_cp_recovers_a_tensor_of_its_own_rank():
    factors = [kernel((n, 3), n) for n in (10, 9, 12)]
    x = (khatri_rao(factors[:2]) @ factors[2].T).reshape(10, 9, 12)
    ours = CPFormat(500, 1e-9, seed=0)
    assert relative(ours.contract(ours.fit(x, (3,))), x) < 1e-4


# --- the registry -----------------------------------------------------------------------------------------------


@each_method
def test_plain_data_round_trip(name):
    method = METHODS[name]()
    assert from_dict(method.to_dict()) == method
    assert decompositions.settings_of(name).keys() == method.to_dict().keys() - {"name"}


def test_variants_compose():
    assert from_dict({"name": "rcp", "order": 3, "seed": 7}) == Reshaped(CP(seed=7), 3)
    assert Reshaped(Tucker(), 2).name == "rtk"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "tucker"}, "method 'tucker' is unknown; choose one of svd, cp"),
        ({"name": "cp", "iterations": 3}, "method.iterations is unknown for cp"),
        ({"name": "cp", "max_iterations": "many"}, "expected a whole number"),
    ],
)
def test_registry_errors_list_the_options(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(data)


@pytest.mark.parametrize(("name", "setting"), [("rtt", "order"), ("cp", "max_iterations"), ("rtk", "tolerance")])
def test_settings_out_of_range_are_refused(name, setting):
    with pytest.raises(DecompositionError, match=f"method.{setting}=-1: expected"):
        from_dict({"name": name, setting: -1})
