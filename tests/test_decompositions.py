"""The laws of `Decomposition`, over all methods and shapes, in float64; tensorly as the oracle."""

from __future__ import annotations

import math
from itertools import product

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker, tensor_train

from tests.methods import TABLE
from tspc import decompositions
from tspc.decompositions import CP, METHODS, SVD, Tucker, from_dict, names
from tspc.decompositions.als import khatri_rao
from tspc.decompositions.cp import CPFormat
from tspc.decompositions.laws import DecompositionLaws, kernel, relative
from tspc.decompositions.reshaped import Reshaped, balanced_factors
from tspc.decompositions.tensor_ring import TensorRingFormat
from tspc.decompositions.tensor_train import TensorTrainFormat
from tspc.decompositions.tucker import TuckerFormat
from tspc.errors import ConfigError, DecompositionError


@pytest.fixture(params=TABLE)
def name(request):
    return request.param


class TestLaws(DecompositionLaws):
    """Of every method in the table."""

    @pytest.fixture(autouse=True)
    def choose(self, name):
        self.method = METHODS[name]()


def test_the_table_has_a_row_for_every_method():
    assert set(TABLE) == set(METHODS)


def test_parameters_follow_the_formulas(name):
    """Those of arXiv:1805.10352, and of tensor rings."""
    method, shape = METHODS[name](), (8, 16, 3, 5)
    rank = tuple(range(1, 1 + len(method.max_rank(shape))))
    assert method.num_params(shape, rank) == TABLE[name].parameters(*rank)


@pytest.mark.parametrize(
    ("name", "rank"),
    [("tk", (1, 9)), ("tt", (1, 4, 1)), ("tr", (1, 1, 4, 1)), ("rtk", (1, 1, 1, 4)), ("rtt", (1, 5, 2))],
)
def test_ranks_that_their_neighbours_cannot_carry_are_refused(name, rank):
    shape = (16, 6, 2, 1)
    with pytest.raises(DecompositionError, match="one entry is too large for the others"):
        METHODS[name]().decompose(kernel(shape), rank)


def test_budget_below_rank_one_is_refused():
    with pytest.raises(DecompositionError, match="needs at least 42 parameters, but the budget is 41"):
        SVD().rank_for((8, 6, 3, 3), 41)


def test_kernels_of_other_dimensions_are_refused():
    with pytest.raises(DecompositionError, match="expected"):
        SVD().max_rank((8, 6, 3))


@pytest.mark.parametrize("name", ["cp", "tk", "tt", "tr"])
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


def test_balanced_factors_multiply_back():
    for number, count in product(range(1, 200), (2, 3, 4)):
        assert math.prod(balanced_factors(number, count)) == number


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


def test_tensor_ring_is_better_than_tensorly():
    """Whose TR-SVD is our start."""
    x = decaying(16, 5, 5, 14)
    ours = TensorRingFormat(20, 1e-5)
    theirs = TensorRingFormat(20, 1e-5, solver="tensorly")
    errors = [relative(form.contract(form.fit(x, (3, 4, 6, 5))), x) for form in (ours, theirs)]
    assert errors[0] < 0.95 * errors[1]


def test_a_ring_with_a_bond_of_one_is_a_tensor_train():
    x = decaying(12, 5, 5, 14)
    rings, trains = TensorRingFormat(50, 1e-7), TensorTrainFormat()
    found, wanted = rings.contract(rings.fit(x, (1, 6, 9, 7))), trains.contract(trains.fit(x, (6, 9, 7)))
    assert relative(found, x) <= 1.0001 * relative(wanted, x)


@pytest.mark.parametrize("name", ["tr", "rtr"])
def test_an_unfolding_of_a_ring_cuts_two_bonds(name):
    method, shape, rank = METHODS[name](), (9, 8, 5, 4), (2, 2, 3, 2)
    cores = [kernel(core, i) for i, core in enumerate(method.factor_shapes(shape, rank))]
    found = method.unfoldings(method.contract(cores, shape))
    assert method.cuts(rank) == (4, 4, 6, 4) == tuple(int(torch.linalg.matrix_rank(matrix)) for matrix in found)


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
        ({"name": "tucker"}, f"^method 'tucker' is unknown; choose one of {', '.join(names())}; a package offers one"),
        ({"name": "rtx"}, f"^method 'rtx' is unknown; choose one of {', '.join(names())}$"),
        ({"name": "cp", "iterations": 3}, "method.iterations is unknown for cp"),
        ({"name": "cp", "max_iterations": "many"}, "expected a whole number"),
        ({"name": "cp", "max_iterations": True}, "method.max_iterations=true: expected a whole number"),
    ],
)
def test_registry_errors_list_the_options(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(data)


@pytest.mark.parametrize(("name", "setting"), [("rtt", "order"), ("cp", "max_iterations"), ("rtk", "tolerance")])
def test_settings_out_of_range_are_refused(name, setting):
    with pytest.raises(DecompositionError, match=f"method.{setting}=-1: expected"):
        from_dict({"name": name, setting: -1})
