"""Unfoldings of a tensor, their dominant subspaces and truncated factorisations, in the tensor's own precision.

The full singular vectors of a wide unfolding are never needed. The eigenvectors of the Gram matrix of its short side
span the dominant subspace; the matrix is projected on that subspace, which keeps the result accurate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EXACT_SIZE = 256
"""Up to this size LAPACK's eigensolver is as fast as any iteration."""
ITERATED_SHARE = 1 / 8
"""For a larger share of the eigenvectors than this, the eigensolver is faster at any size."""
MAX_STEPS = 24
GAIN = 1e-3
"""The iteration stops once a step lowers the squared error by less than this share; with the oversampling below
the error is then within 0.1 % of the least possible, for flat spectra and falling ones."""
REPEATED = 2
"""Steps of orthogonal iteration that renew a basis."""
NOISE = 1e-5
"""Below this squared relative error, a float32 Gram matrix cannot tell a small error from rounding."""


def dominant_basis(matrix: Tensor, rank: int, start: Tensor | None = None) -> Tensor:
    """Orthonormal basis (m × rank) of the dominant left singular subspace of an m × n matrix.

    `start` is a basis (m × rank) that is already close. With it, the result may be a few steps of orthogonal iteration
    from `start`; each step captures at least as much of the matrix as the one before.
    """
    m, n = matrix.shape
    if m > n:
        return torch.linalg.qr(matrix @ dominant_basis(matrix.T, rank)).Q
    if start is not None and m > EXACT_SIZE:
        basis = start
        for _ in range(REPEATED):
            basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
        return basis
    basis, error2 = eigenvectors(gram(matrix), rank)
    if matrix.dtype == torch.float32 and error2 < NOISE:
        basis = eigenvectors(gram(matrix.double()), rank)[0].to(matrix.dtype)
    return basis


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The unfolding n × rest of a mode; a copy unless the mode is the first or the last of a contiguous tensor."""
    n = tensor.shape[mode]
    return tensor.reshape(-1, n).T if mode == tensor.ndim - 1 else tensor.movedim(mode, 0).reshape(n, -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Contracts `mode` of the tensor with the columns of `matrix` (rows become the new mode)."""
    if mode == tensor.ndim - 1:
        return (tensor.reshape(-1, tensor.shape[-1]) @ matrix.T).reshape(*tensor.shape[:-1], -1)
    product = matrix @ unfold(tensor, mode)
    rest = tensor.shape[:mode] + tensor.shape[mode + 1 :]
    return product.reshape(-1, *rest).movedim(0, mode)


def projected(tensor: Tensor, sizes: Mapping[int, int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The tensor projected on the dominant subspaces of some modes, and the bases (n × size).

    `sizes` maps a mode to the dimension of its subspace. The modes are projected one after the other: the sequentially
    truncated HOSVD (Vannieuwenhoven, Vandebril & Meerbergen, SIAM J. Sci. Comput. 2012).
    """
    bases = dict[int, Tensor]()
    for mode, size in sizes.items():
        bases[mode] = dominant_basis(unfold(tensor, mode), size)
        tensor = mode_product(tensor, bases[mode].T, mode)
    return tensor, bases


def gram(matrix: Tensor) -> Tensor:
    """M·Mᵀ. Of a large one only the blocks on and above the diagonal are computed."""
    m = len(matrix)
    if m <= EXACT_SIZE or matrix.device.type != "cpu":
        return matrix @ matrix.T
    result = matrix.new_empty(m, m)
    for i in range(0, m, EXACT_SIZE):
        rows = matrix[i : i + EXACT_SIZE]
        result[i : i + EXACT_SIZE, i:] = rows @ matrix[i:].T
        result[i + EXACT_SIZE :, i : i + EXACT_SIZE] = result[i : i + EXACT_SIZE, i + EXACT_SIZE :].T
    return result


def short_gram(matrix: Tensor) -> Tensor:
    """The Gram matrix of the shorter side."""
    return gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)


def squared_singular_values(matrix: Tensor) -> Tensor:
    """The squares of the singular values, largest first."""
    return eigenvalues(short_gram(matrix))


SAME = 1e-5
"""Two Gram matrices whose difference is at most this share of their norm have the same eigenvalues, up to rounding."""


class Spectra:
    """`squared_singular_values`, which knows the matrices that it had before, whatever the order of their columns.

    Different methods cut the same unfoldings of a kernel. Their Gram matrices are equal, and the eigenvalues of these
    take most of the time.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, matrix: Tensor) -> Tensor:
        own = short_gram(matrix)
        for other, values in self._known:
            if other.shape == own.shape and float((other - own).norm()) <= SAME * float(values.norm()):
                return values
        self._known.append((own, eigenvalues(own)))
        return self._known[-1][1]


def eigenvalues(gram: Tensor) -> Tensor:
    """The eigenvalues of a positive semidefinite matrix, largest first."""
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank, as `left @ right`. Both hold the roots of the singular values."""
    m, n = matrix.shape
    if m > n:
        right, left = truncated_svd(matrix.T, rank)
        return left.T, right.T
    basis = dominant_basis(matrix, rank)
    projected = basis.T @ matrix
    scale = torch.linalg.vector_norm(projected, dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return basis * scale, projected / scale[:, None]


def eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """Orthonormal eigenvectors of the `rank` largest eigenvalues, largest first, with a fixed sign.

    Also the share of the trace that the other eigenvalues hold.
    """
    few = len(gram) > EXACT_SIZE and rank < ITERATED_SHARE * len(gram)
    block = _iterated(gram, rank + rank // 4 + 10) if few else None
    if block is None:
        values, vectors = torch.linalg.eigh(gram)
    else:
        values, inner = torch.linalg.eigh(block.T @ (gram @ block))
        vectors = block @ inner[:, -rank:]
    vectors = vectors[:, -rank:].flip(-1)
    # The sign of an eigenvector is arbitrary; a fixed sign makes results comparable between machines.
    pivot = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    total = float(gram.diagonal().sum())
    missed = 1 - float(values[-rank:].sum()) / total if total > 0 else 0.0
    return torch.where(pivot < 0, -vectors, vectors), missed


def _iterated(gram: Tensor, size: int) -> Tensor | None:
    """Orthogonal iteration from seeded Gaussian columns (Halko, Martinsson & Tropp, SIAM Review 2011).

    Returns an orthonormal n × size block, or None if the spectrum is too flat to converge soon.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(gram), size, generator=generator, dtype=gram.dtype, device="cpu").to(gram.device)
    block = torch.linalg.qr(gram @ noise).Q
    total, captured = float(gram.diagonal().sum()), 0.0
    for _ in range(MAX_STEPS):
        image = gram @ block
        energy = float((block * image).sum())
        if energy - captured <= GAIN * (total - energy):
            return block
        captured = energy
        block = torch.linalg.qr(image).Q
    return None
