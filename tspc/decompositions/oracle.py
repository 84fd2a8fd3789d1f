"""`solver: tensorly`: the same fits by tensorly's solvers (Kossaifi et al., JMLR 2019), for comparison.

tensorly is imported at the first use. Its backend is changed only during a call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from tspc.decompositions.kernels import Rank
from tspc.errors import DecompositionError

SOLVERS = ("native", "tensorly")


@contextmanager
def _tensorly() -> Iterator[None]:
    """PyTorch as tensorly's backend; a failure of its solver becomes a DecompositionError."""
    from tensorly.backend import backend_context  # pyright: ignore[reportAttributeAccessIssue]

    with backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        # It warns of ranks above a mode's size, although it handles them.
        warnings.simplefilter("ignore")
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise DecompositionError(f"tensorly's solver broke down ({error}); use method.solver=native") from error


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor padded with zeros up to `shape`: tensorly drops columns that it does not need."""
    result = tensor.new_zeros(shape)
    result[tuple(slice(n) for n in tensor.shape)] = tensor
    return result


def svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """m × R and R × n factors; both hold the roots of the singular values."""
    from tensorly.tenalg import svd_interface

    with _tensorly():
        left, values, right = svd_interface(matrix, n_eigenvecs=rank)
    scale = values.sqrt()
    return left * scale, right * scale[:, None]


def tucker(tensor: Tensor, rank: Rank, max_iterations: int, tolerance: float) -> list[Tensor]:
    """n_i × R_i matrices of the leading modes, then the core."""
    from tensorly.decomposition import partial_tucker

    with _tensorly():
        (core, matrices), _ = partial_tucker(
            tensor, rank, modes=list(range(len(rank))), n_iter_max=max_iterations, tol=tolerance
        )
    shapes = zip(tensor.shape, rank, strict=False)
    padded = [_padded(matrix, shape) for matrix, shape in zip(matrices, shapes, strict=True)]
    return [*padded, _padded(core, (*rank, *tensor.shape[len(rank) :]))]


def tensor_train(tensor: Tensor, rank: Rank) -> list[Tensor]:
    """Cores R_{k-1} × n_k × R_k."""
    from tensorly import decomposition

    bonds = (1, *rank, 1)
    with _tensorly():
        cores = decomposition.tensor_train(tensor, rank=list(bonds)).factors
    shapes = [(bonds[k], n, bonds[k + 1]) for k, n in enumerate(tensor.shape)]
    return [_padded(cores[k], shape) for k, shape in enumerate(shapes)]  # pyright: ignore[reportArgumentType]


def tensor_ring(tensor: Tensor, rank: Rank) -> list[Tensor]:
    """Cores R_{k-1} × n_k × R_k; the last bond is the first one."""
    from tensorly import decomposition

    with _tensorly():
        cores = decomposition.tensor_ring(tensor, rank=[*rank, rank[0]]).factors
    return [core for core in cores if core is not None]


def cp(tensor: Tensor, rank: int, max_iterations: int, tolerance: float, seed: int) -> list[Tensor]:
    """n_i × R matrices."""
    from tensorly.decomposition import parafac

    with _tensorly():
        _, factors = parafac(tensor, rank, n_iter_max=max_iterations, tol=tolerance, random_state=seed)
    if not all(factor.isfinite().all() for factor in factors):
        raise DecompositionError("tensorly's solver broke down (no finite factors); use method.solver=native")
    return list(factors)
