"""Rounding of a matrix to a grid, such that later columns make up for the errors of earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from tspc.quantization.grids import Grid

DAMPING = 1e-2
"""Added to the diagonal of the second moments, as a share of its mean."""
BLOCK = 128
"""Columns whose errors reach the columns behind them together."""


def with_feedback(matrix: Tensor, grid: Grid, moments: Tensor) -> Tensor:
    """The matrix (R × n) on the grid, with a small error tr(D M Dᵀ) in the second moments M of its inputs.

    The columns are rounded one after the other, the one with the largest moment first, and the columns that are left
    take the change that makes up best for its error: GPTQ (Frantar et al., ICLR 2023). `moments` is n × n, or has a
    matrix for each row (R × n × n). Rounding to nearest is returned if its error is smaller.
    """
    nearest = grid.rounded(matrix)
    moments = moments.to(matrix)
    if not bool(moments.isfinite().all()):
        return nearest
    order = moments.diagonal(dim1=-2, dim2=-1).reshape(-1, matrix.shape[1]).sum(0).argsort(descending=True)
    inverse = _inverse_factor(moments[..., order[:, None], order])
    if inverse is None:
        return nearest
    found = torch.empty_like(matrix)
    found[:, order] = _rounded(matrix[:, order], grid, inverse)
    return torch.where((_errors(found - matrix, moments) < _errors(nearest - matrix, moments))[:, None], found, nearest)


def _inverse_factor(moments: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse; None if there is none."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    damping = (DAMPING * diagonal.mean(-1, keepdim=True)).clamp(min=torch.finfo(moments.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(moments + torch.diag_embed(damping.expand_as(diagonal)))
    if bool(failed.any()):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    return None if bool(failed.any()) else upper


def _rounded(matrix: Tensor, grid: Grid, inverse: Tensor) -> Tensor:
    work, found = matrix.clone(), torch.empty_like(matrix)
    n = matrix.shape[1]
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        block, errors = work[:, start:end], work.new_empty(len(work), end - start)
        for i in range(end - start):
            column = start + i
            value = grid.rounded(block[:, i : i + 1])
            found[:, column] = value[:, 0]
            errors[:, i] = (block[:, i] - value[:, 0]) / inverse[..., column, column]
            block[:, i + 1 :] -= errors[:, i : i + 1] * inverse[..., column, column + 1 : end]
        if end < n:
            if inverse.ndim == 2:
                work[:, end:] -= errors @ inverse[start:end, end:]
            else:
                work[:, end:] -= (errors[:, None] @ inverse[:, start:end, end:])[:, 0]
    return found


def _errors(difference: Tensor, moments: Tensor) -> Tensor:
    """The squared error of each row."""
    if moments.ndim == 2:
        return ((difference @ moments) * difference).sum(1)
    return ((difference[:, None] @ moments)[:, 0] * difference).sum(1)
