"""Sweeps over the cores of a ring, and descent with extrapolation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.test_decompositions import decaying
from tspc.decompositions.descent import Steps, descend
from tspc.decompositions.laws import kernel, relative
from tspc.decompositions.ring_als import _sweep, alternate, contracted
from tspc.decompositions.tensor_ring import TensorRingFormat, _by_svd

RINGS = [((7, 6, 5), (2, 3, 4)), ((7, 3, 4, 8), (2, 3, 4, 3)), ((6, 5), (2, 3))]


@pytest.mark.parametrize(("dims", "rank"), RINGS, ids=str)
def test_every_cut_gives_the_same_sweep_and_the_last_core_is_the_best(dims, rank):
    x = kernel(dims)
    start = [kernel(shape, i) for i, shape in enumerate(TensorRingFormat(1, 0.1).factor_shapes(dims, False, rank))]
    norm2 = float(x.square().sum())
    swept = [_sweep(x, norm2, start, cut) for cut in range(1, len(dims))]
    for cores, squared in swept:
        assert squared == pytest.approx(float((x - contracted(cores)).square().sum()), rel=1e-6)
        torch.testing.assert_close(contracted(cores), contracted(swept[0][0]), rtol=1e-5, atol=1e-5)
    cores, squared = swept[0]
    # The columns of the design matrix: the ring with a unit in the place of each entry of the last core.
    units = torch.eye(cores[-1].numel(), dtype=x.dtype).reshape(-1, *cores[-1].shape)
    design = torch.stack([contracted([*cores[:-1], unit]).flatten() for unit in units], 1)
    best = torch.linalg.lstsq(design, x.flatten()).solution
    assert squared == pytest.approx(float((design @ best - x.flatten()).square().sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweeps_lower_the_error_of_the_start(dtype):
    x = decaying(16, 9, 14).to(dtype)
    start = _by_svd(x, (3, 4, 5))
    errors = [relative(contracted(alternate(x, start, n, 1e-6)), x) for n in (1, 3, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.99 * relative(contracted(start), x)


@pytest.mark.parametrize(("seed", "least"), [(0, 1e-5), (2, 0.335)])
def test_float32_is_as_good_as_float64(seed, least):
    """A ring is found again; in another one, parts grow and cancel each other."""
    form = TensorRingFormat(100, 1e-7)
    shapes = form.factor_shapes((12, 5, 5, 14), False, (2, 3, 3, 2))
    x = contracted([kernel(shape, 10 * seed + i) for i, shape in enumerate(shapes)])
    for precise in (x, x.float()):
        found = form.fit(precise, (2, 3, 3, 2))
        assert all(core.dtype == precise.dtype for core in found)
        assert relative(contracted(found).double(), x) < least


def test_cores_that_depend_on_each_other_are_solved():
    """All columns of the normal equations are equal, so that rounding decides about their sign."""
    x = torch.ones(40, 30, 50, dtype=torch.float32)
    start = [torch.ones(4, 40, 4), torch.ones(4, 30, 4), torch.ones(4, 50, 4)]
    cores, squared = _sweep(x, float(x.square().sum()), start, 1)
    assert relative(contracted(cores), x) < 1e-3
    assert squared < 1e-6 * float(x.square().sum())


@dataclass
class Point:
    parts: list[torch.Tensor]
    objective: float


def test_extrapolation_needs_fewer_sweeps_and_never_ends_above_the_start():
    matrix = torch.tensor([[1.0, 0.95], [0.95, 1.0]], dtype=torch.float64)

    def sweep(parts):
        x, y = parts
        x = -matrix[0, 1] * y  # the minimum over x, then over y
        y = -matrix[0, 1] * x
        both = torch.stack([x, y])
        return Point([x, y], float(both @ matrix @ both) + 1)

    one = torch.tensor(1.0, dtype=torch.float64)
    start = Point([one, one], 5.0)
    plain, ahead = (descend(start, sweep, 6, 0.0, Steps(first=first)).objective for first in (0.0, 1.0))
    assert 1 <= ahead < plain < 5
    worse = descend(Point([one, one], 0.5), sweep, 6, 0.0, Steps())
    assert worse.objective == 0.5
