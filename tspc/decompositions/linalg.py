"""Truncated factorisations of a matrix by the Gram matrix of its short side.

A wide unfolding never needs its full singular vectors: the eigenvectors of the small Gram matrix give the
dominant subspace, and projecting on it keeps the result accurate although squaring loses half the digits of
the small singular values. All functions expect float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _dominant(gram: Tensor, rank: int) -> Tensor:
    """Orthonormal eigenvectors of the `rank` largest eigenvalues, largest first, with a fixed sign."""
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    # The sign of an eigenvector is arbitrary; fixing it makes results comparable between machines.
    pivot = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(pivot < 0, -1.0, 1.0)


def dominant_basis(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal basis (m × rank) of the dominant left singular subspace of an m × n matrix."""
    m, n = matrix.shape
    if m <= n:
        return _dominant(matrix @ matrix.T, rank)
    image = matrix @ _dominant(matrix.T @ matrix, rank)
    return torch.linalg.qr(image).Q


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation as `left @ right`, singular values split evenly between the two."""
    m, n = matrix.shape
    if m > n:
        right, left = truncated_svd(matrix.T, rank)
        return left.T, right.T
    basis = _dominant(matrix @ matrix.T, rank)
    projected = basis.T @ matrix
    scale = torch.linalg.vector_norm(projected, dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return basis * scale, projected / scale[:, None]
