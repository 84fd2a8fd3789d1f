"""What the fits guarantee beyond the laws of `Decomposition`: precision, monotony, bounded components, the oracle."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from tests.methods import TABLE
from tspc.decompositions import METHODS, SVD, Decomposition, Factors, settings_of
from tspc.decompositions.als import alternate, gaussian, slice_spectrum, slice_svd
from tspc.decompositions.cp import CPFormat, component_norms
from tspc.decompositions.linalg import Spectra, dominant_basis, gram, squared_singular_values, truncated_svd
from tspc.errors import DecompositionError

each_method = pytest.mark.parametrize("name", METHODS)
each_with_a_solver = pytest.mark.parametrize("name", [name for name in METHODS if "solver" in settings_of(name)])
SHAPE = (12, 8, 3, 3)


def gaussian_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def fitted(method: Decomposition, kernel: torch.Tensor, rate: float) -> Factors:
    return method.decompose(kernel, method.rank_for(tuple(kernel.shape), int(rate * kernel.numel())))


# --- dominant subspaces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(400, 700), (700, 400), (60, 40)])
@pytest.mark.parametrize("rank", [1, 20, 39])
def test_truncated_svd_is_within_a_thousandth_of_the_best(shape, rank, decay):
    left, _, right = torch.linalg.svd(gaussian_tensor(*shape), full_matrices=False)
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    x = left * values @ right
    best = float(values[rank:].norm() / values.norm())
    for precise in (x, x.float()):
        a, b = truncated_svd(precise, rank)
        assert relative((a @ b).double(), x) <= 1.001 * best + torch.finfo(precise.dtype).eps * 20


def test_a_float32_tail_below_its_square_root_of_precision_is_told_from_noise():
    x = torch.linalg.qr(gaussian_tensor(40, 40)).Q * torch.logspace(0, -6, 40, dtype=torch.float64)
    a, b = truncated_svd(x.float(), 30)
    assert relative((a @ b).double(), x) < 3e-5


@pytest.mark.parametrize("shape", [(200, 300), (700, 90), (600, 800)])
def test_a_gram_matrix_is_the_product(shape):
    x = gaussian_tensor(*shape)
    torch.testing.assert_close(gram(x), x @ x.T)
    torch.testing.assert_close(squared_singular_values(x), torch.linalg.svdvals(x).square())


def test_spectra_know_a_matrix_with_its_columns_in_another_order_and_no_other():
    x, squares = gaussian_tensor(30, 50).float(), Spectra()
    values = squares(x)
    assert squares(x[:, torch.randperm(50, generator=torch.Generator().manual_seed(0))].T) is values
    other = x.clone()
    other[0, 0] += 0.1
    torch.testing.assert_close(squares(other), squared_singular_values(other))
    assert squares(other) is not values


@pytest.mark.parametrize("shape", [(3, 8, 10), (9, 20, 12), (2, 3, 6, 5)])
def test_the_slices_spectrum_is_that_of_the_start(shape):
    x = gaussian_tensor(*shape)
    top = math.prod(shape[:-1])
    sizes = slice_svd(x, min(top, math.prod(shape[:-2]) * min(shape[-2:]))).sizes
    expected = sizes.square().sort(descending=True).values
    torch.testing.assert_close(slice_spectrum(x)[: len(expected)], expected)
    assert float(slice_spectrum(x).sum()) == pytest.approx(float(x.square().sum()))


def test_a_step_from_a_near_basis_captures_no_less():
    x, start = gaussian_tensor(300, 400), torch.linalg.qr(gaussian_tensor(300, 30, seed=1)).Q
    captured = [float((start.T @ x).norm())]
    for _ in range(4):
        start = dominant_basis(x, 30, start=start)
        captured.append(float((start.T @ x).norm()))
    assert captured == sorted(captured)
    assert relative(start.T @ start, torch.eye(30, dtype=x.dtype)) < 1e-12


# --- all methods ------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (30, 40)])
def test_full_rank_is_exact_in_single_precision(name, shape):
    method, k = METHODS[name]().for_shape(shape), gaussian_tensor(*shape).float()
    assert relative(method.reconstruct(method.decompose(k, method.max_rank(shape))), k) < 1e-5


@each_method
def test_single_precision_fits_as_well_as_double(name):
    method, k = METHODS[name](), gaussian_tensor(24, 16, 3, 3)
    errors = [relative(method.reconstruct(fitted(method, x, 0.3)).double(), k) for x in (k, k.float())]
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


@each_method
def test_half_precision_is_kept(name):
    method, k = METHODS[name](), gaussian_tensor(*SHAPE).half()
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in fitted(method, k, 0.5).tensors)


@each_method
@pytest.mark.parametrize("seed", range(3))
def test_error_does_not_rise_with_the_rank(name, seed):
    method, k = METHODS[name](), gaussian_tensor(*SHAPE, seed=seed)
    errors = [relative(method.reconstruct(fitted(method, k, rate)), k) for rate in (0.12, 0.2, 0.35, 0.5, 0.7, 0.9)]
    assert errors == sorted(errors, reverse=True)


@each_method
def test_dead_channels_stay_dead(name):
    k = gaussian_tensor(*SHAPE)
    k[5], k[:, 2] = 0, 0
    method = METHODS[name]()
    result = method.reconstruct(fitted(method, k, 0.6))
    assert result.isfinite().all()
    if "order" not in settings_of(name):
        assert float(result[5].norm() + result[:, 2].norm()) < 1e-8 * float(k.norm())


@each_method
def test_entries_whose_sum_overflows_are_finite_all_the_same(name):
    k = torch.full((4, 3, 3, 3), 1e38)
    with pytest.raises(DecompositionError, match="NaN or infinite"):
        METHODS[name]().decompose(k * torch.inf, tuple(1 for _ in METHODS[name]().max_rank((4, 3, 3, 3))))
    method = METHODS[name]()
    method._check(k, (4, 3, 3, 3), tuple(1 for _ in method.max_rank((4, 3, 3, 3))))


# --- canonical polyadic -----------------------------------------------------------------------------------------


def border_rank_two() -> torch.Tensor:
    """Rank 3, but the limit of tensors of rank 2 (de Silva & Lim, SIAM J. Matrix Anal. Appl. 2008)."""
    a, b = torch.eye(3, dtype=torch.float64)[:2]
    return sum(torch.einsum("i,j,k->ijk", *term) for term in ((a, a, b), (a, b, a), (b, a, a)))  # type: ignore[return-value]


@pytest.mark.parametrize("bound", [2.0, 3.0, 10.0])
def test_components_stay_bounded_where_no_best_fit_exists(bound):
    x = border_rank_two()
    ours = CPFormat(500, 0.0, restarts=3, max_component_norm=bound)
    factors = ours.fit(x, (2,))
    assert float(component_norms(factors).max()) <= bound * float(x.norm())
    assert ours.diagnose(factors) is None
    assert relative(ours.contract(factors), x) < 0.3


def test_components_that_cancel_each_other_are_named():
    a, b = torch.eye(4)[:2]
    near = a + 1e-2 * b
    factors = Factors(
        (
            torch.stack([a, -a])[:, :, None, None] * 50,
            torch.stack([a, near])[:, None, :, None],
            torch.stack([a, near], 1)[:, :, None, None],
        ),
        (4, 4, 4, 1),
        (2,),
    )
    assert str(METHODS["cp"]().diagnose(factors)).startswith("degenerate: components of norm 70.7 ‖K‖ cancel")
    assert METHODS["cp"](max_component_norm=100.0).diagnose(factors) is None


@each_method
def test_sound_fits_have_no_diagnosis(name):
    method = METHODS[name]()
    assert method.diagnose(fitted(method, gaussian_tensor(*SHAPE), 0.4)) is None
    assert method.diagnose(method.decompose(torch.zeros(SHAPE), method.rank_for(SHAPE, 100))) is None


@pytest.mark.parametrize("dims", [(9, 12, 14), (3, 4, 5, 6)])
def test_slices_are_orthogonal_and_better_with_every_component(dims):
    x, f = gaussian_tensor(*dims), CPFormat(1, 0.0)
    errors = [relative(f.contract(slice_svd(x, r).factors()), x) for r in (1, 5, 20, *f.max_rank(dims, False))]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12
    kept = slice_svd(x, 20)
    grams = torch.stack([unit.T @ unit for unit in kept.units]).prod(0)
    assert relative(grams, torch.eye(20, dtype=x.dtype)) < 1e-10


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_sweeps_lower_the_objective_and_bound_the_components(random, ridge):
    x = gaussian_tensor(9, 12, 14)
    start = gaussian(x, 15, torch.Generator().manual_seed(0)) if random else slice_svd(x, 15)
    found = [alternate(x, start, ridge, n, 0.0) for n in (1, 2, 4, 8, 16, 32)]
    assert [f.objective for f in found] == sorted((f.objective for f in found), reverse=True)
    for f in found:
        error = relative(CPFormat(1, 0.0).contract(f.factors()), x)
        penalty = ridge * float(f.sizes.square().sum() / x.square().sum())
        assert f.objective == pytest.approx(error**2 + penalty, rel=1e-6)
        assert float(f.sizes.max()) <= float(x.norm()) / math.sqrt(ridge)


def test_more_starts_are_no_worse():
    x = gaussian_tensor(9, 12, 14)
    errors = [relative(CPFormat(20, 0.0).contract(CPFormat(20, 0.0, restarts=n).fit(x, (10,))), x) for n in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)


# --- solver=tensorly --------------------------------------------------------------------------------------------


@each_with_a_solver
@pytest.mark.parametrize("shape", [(16, 12, 3, 3), (20, 30)])
def test_tensorly_keeps_the_contract_and_is_no_better(name, shape):
    k = gaussian_tensor(*shape)
    errors = []
    for solver in ("native", "tensorly"):
        method = METHODS[name](solver=solver).for_shape(shape)
        factors = fitted(method, k, 0.3)
        assert tuple(tuple(t.shape) for t in factors.tensors) == method.factor_shapes(shape, factors.rank)
        errors.append(relative(method.reconstruct(factors), k))
    assert errors[0] <= TABLE[name].slack * errors[1]
    assert torch.equal(fitted(method, k, 0.3).tensors[0], factors.tensors[0])


def test_without_spatial_extent_the_solver_is_kept():
    assert METHODS["tk"](solver="tensorly").for_shape((4, 5)) == SVD("tensorly")


@each_with_a_solver
def test_other_solvers_are_refused(name):
    with pytest.raises(DecompositionError, match="method.solver=fast: expected one of native, tensorly"):
        METHODS[name](solver="fast")


def test_tensorly_is_imported_when_asked_for():
    code = "import sys, tspc.decompositions; assert 'tensorly' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
