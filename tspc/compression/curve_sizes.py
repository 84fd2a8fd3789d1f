"""At which sizes the curve of a layer is measured, and where spectra alone give it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tspc.compression.form import rank_for
from tspc.decompositions import Decomposition, Metric, Rank, Shape

FITTED = (0.03, 0.08, 0.2, 0.5)
"""In function space quick fits give the points of a curve: at these sizes, relative to the dense kernel, and at the
smallest rank. For a matrix the spectrum gives the whole curve."""
COARSE, COARSEST = (0.05, 0.25), (0.08,)
"""The same for kernels with more than WIDE inputs, and without function space; the second, where spectra show more."""
SMALL = 40_000
"""Without function space, kernels with at most so many entries have fits at all sizes in FITTED. These are quick."""
ESTIMATED = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.35, 0.5)
"""The sizes of a curve that follows from spectra; where there are fits, they correct it. All their sizes are here."""
LARGE = (0.6, 0.7, 0.8, 0.9)
"""More of them, for a method that at its full rank is no larger than the kernel. The others are of no use there."""
WIDE = 1024
"""With more inputs than this, the points of a curve are few, and measured one after the other. Each takes the memory of
several second moments, and its products are large enough for all threads."""


def fitted_ranks(method: Decomposition, shape: Shape, metric: Metric | None) -> list[Rank]:
    """The ranks at which the error is that of a fit."""
    if _is_exact(method, shape, metric):
        return []
    if metric is not None and not is_wide(metric):
        return _ranks(method, shape, FITTED)
    if method.course() is None:
        return _ranks(method, shape, COARSE)
    ranks = _ranks(method, shape, FITTED if metric is None and math.prod(shape) <= SMALL else COARSEST)
    return ranks[1:] or ranks  # the estimate at the smallest rank is close


def _is_exact(method: Decomposition, shape: Shape, metric: Metric | None) -> bool:
    """Whether spectra alone give the curve."""
    if metric is not None:
        return method.is_spectral and method.is_matrix_factorisation(shape)
    is_product = len(method.factor_shapes(shape, tuple(1 for _ in method.max_rank(shape)))) == 2
    return method.is_spectral or (is_product and method.course() == method)  # a product is a truncated SVD


def is_estimated(method: Decomposition, shape: Shape, metric: Metric | None) -> bool:
    """Whether spectra show the course of the curve between the fits."""
    if metric is None or is_wide(metric):
        return method.course() is not None
    return _is_exact(method, shape, metric)


def is_wide(metric: Metric) -> bool:
    return len(metric.inputs) > WIDE


def middle_rank(method: Decomposition, shape: Shape) -> Rank:
    """The rank at which methods are compared before the better ones have more fits."""
    return _ranks(method, shape, COARSEST)[-1]


def estimated_ranks(method: Decomposition, shape: Shape) -> list[Rank]:
    """The ranks at which spectra give an estimate."""
    factors = method.factor_shapes(shape, method.max_rank(shape))
    is_never_large = sum(map(math.prod, factors)) <= math.prod(shape)
    return _ranks(method, shape, ESTIMATED + LARGE if is_never_large else ESTIMATED)


def _ranks(method: Decomposition, shape: Shape, shares: Sequence[float]) -> list[Rank]:
    """The smallest rank, and the largest rank within each of the shares, without duplicates of a size."""
    smallest, size = method.min_params(shape), math.prod(shape)
    ranks = [tuple(1 for _ in method.max_rank(shape))]
    ranks += [rank_for(method, shape, int(size * share)) for share in shares if size * share > smallest]
    return list({method.num_params(shape, rank): rank for rank in ranks}.values())
