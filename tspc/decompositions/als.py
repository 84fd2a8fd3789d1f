"""Alternating least squares for the canonical polyadic decomposition, with bounded components.

The objective is ‖X − X̂‖² + μ Σ_r ‖x_r‖², over sums X̂ = Σ_r x_r of R rank-one tensors. Without the second term,
components can grow without bound while they cancel each other (Phan et al., "Stable low-rank tensor decomposition
for compression of convolutional neural network", ECCV 2020). Zero factors give the objective ‖X‖², and no solve ends
above that. So every component stays below ‖X‖ / √μ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tspc.decompositions.descent import Steps, descend
from tspc.decompositions.kernels import double
from tspc.decompositions.linalg import dominant_basis, projected

STEPS = Steps(longest=1.5, growth=1.1, patience=2)
"""After one small gain the sweeps may just be leaving a saddle."""
NARROW, SHARE = 64, 0.6
"""The largest number of directions that a projection keeps of a mode, and their largest share."""


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product: n_i × R matrices give a ∏n_i × R matrix; the first index is the slowest."""
    result = matrices[0]
    for matrix in matrices[1:]:
        result = (result[:, None, :] * matrix[None, :, :]).reshape(-1, result.shape[1])
    return result


@dataclass(frozen=True)
class Components:
    """Σ_r size_r · u_r ∘ v_r ∘ … : for each mode an n_i × R matrix of unit columns, and R sizes.

    `objective` is the value of the objective, divided by ‖X‖²; it is infinite before it is known.
    """

    units: list[Tensor]
    sizes: Tensor
    objective: float = math.inf

    @property
    def parts(self) -> list[Tensor]:
        return self.units

    def factors(self) -> list[Tensor]:
        """n_i × R matrices; a component has the same norm in all of them."""
        share = self.sizes ** (1 / len(self.units))
        return [unit * share for unit in self.units]


def _slices(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The slices over the last two modes (count × rows × columns), and the principal axes of the other modes.

    The other modes are rotated to these axes first.
    """
    *small, rows, columns = tensor.shape
    axes = []
    for mode, n in enumerate(small):
        axes.append(dominant_basis(tensor.movedim(mode, 0).reshape(n, -1), n))
        tensor = torch.tensordot(axes[-1].T, tensor.movedim(mode, 0), dims=1).movedim(0, mode)
    return tensor.reshape(-1, rows, columns), axes


def slice_spectrum(tensor: Tensor) -> Tensor:
    """The squares of the sizes that `slice_svd` gives at the highest rank, largest first."""
    slices, _ = _slices(tensor)
    return torch.linalg.eigvalsh(slices @ slices.mT).flatten().clamp(min=0).sort(descending=True).values


def slice_svd(tensor: Tensor, rank: int) -> Components:
    """The `rank` largest singular triplets of the slices over the last two modes.

    The components are orthogonal. The error never rises with the rank, and it is zero at the highest rank.
    """
    slices, axes = _slices(tensor)
    small, rows = tensor.shape[:-2], slices.shape[1]
    values, vectors = torch.linalg.eigh(slices @ slices.mT)
    chosen = values.flatten().topk(rank).indices.sort().values
    which, column = chosen // rows, chosen % rows
    left = vectors[which, :, column]
    counts = torch.bincount(which, minlength=len(slices)).tolist()
    right = torch.cat([part @ piece for part, piece in zip(left.split(counts), slices, strict=True)])
    index = torch.unravel_index(which, tuple(small))
    units, sizes = _normalised(right.T)
    return Components([*(a[:, i] for a, i in zip(axes, index, strict=True)), left.T, units], sizes)


@dataclass(frozen=True)
class Projection:
    """A tensor projected on the dominant subspaces of its large modes. The bases are n_i × q_i.

    `share` is the part of ‖X‖² that `core` keeps.
    """

    core: Tensor
    bases: dict[int, Tensor]
    share: float = 1.0

    def lifted(self, found: Components) -> Components:
        """Components of `core` as components of the tensor."""
        units = [self.bases[mode] @ unit if mode in self.bases else unit for mode, unit in enumerate(found.units)]
        return Components(units, found.sizes, 1 - (1 - found.objective) * self.share)


def project(tensor: Tensor, rank: int) -> Projection:
    """Projects the tensor on the dominant subspaces of its modes, with about R dimensions each.

    A sum of R components lies in subspaces of R dimensions, and the dominant ones are nearly the best. Sweeps inside
    them cost a fraction of sweeps over the whole tensor (CANDELINC: Carroll, Pruzansky & Kruskal, Psychometrika 1980;
    Bro & Andersson, Chemometr. Intell. Lab. Syst. 1998). A mode is not projected if this would leave too little for R
    components.
    """
    sizes = [n if rank >= n else min(rank, max(NARROW, int(SHARE * n))) for n in tensor.shape]
    is_enough = math.prod(sizes) // max(sizes) >= rank
    core, bases = projected(tensor, {mode: q for mode, q in enumerate(sizes) if is_enough and q < tensor.shape[mode]})
    norm2 = _square(tensor)
    return Projection(core.contiguous(), bases, _square(core) / norm2 if norm2 > 0 else 1.0)


def gaussian(tensor: Tensor, rank: int, generator: torch.Generator) -> Components:
    """Random directions, the same on every device."""
    draws = [torch.randn(n, rank, generator=generator, dtype=tensor.dtype, device="cpu") for n in tensor.shape]
    units = [_normalised(draw.to(tensor.device))[0] for draw in draws]
    return Components(units, torch.zeros(rank, dtype=tensor.dtype, device=tensor.device))


def alternate(tensor: Tensor, start: Components, ridge: float, max_iterations: int, tolerance: float) -> Components:
    """Sweeps over the modes until the relative error stops falling; `ridge` is μ, above 0.

    If the objective of `start` is unknown, its components must be orthogonal or have size zero.
    """
    norm2 = _square(tensor)
    if norm2 == 0:
        return start
    if math.isinf(start.objective):
        captured = _square(start.sizes) / norm2
        start = replace(start, objective=1 - (1 - ridge) * captured)

    def sweep(parts: Sequence[Tensor]) -> Components:
        return _sweep(tensor, norm2, [_normalised(part)[0] for part in parts], ridge)

    return descend(start, sweep, max_iterations, tolerance, STEPS)


def _sweep(tensor: Tensor, norm2: float, units: list[Tensor], ridge: float) -> Components:
    """One pass over all modes, from unit columns, without a reconstruction.

    All modes except the last share one contraction of the tensor with the last matrix (a dimension tree of depth
    two; Phan, Tichavský & Cichocki, IEEE TSP 2013). So a sweep reads the tensor only twice.
    """
    units = list(units)
    *rows, last = range(tensor.ndim)
    grams = [_gram(unit) for unit in units]
    flat = tensor.reshape(-1, tensor.shape[last])
    partial = (flat @ units[last]).reshape(*tensor.shape[:-1], -1)
    for mode in rows:
        product = partial
        for other in reversed([m for m in rows if m != mode]):
            axis = other if other < mode else -2
            product = (product.movedim(axis, -2) * units[other]).sum(-2)
        units[mode] = _normalised(_solve(product, grams, mode, ridge))[0].to(tensor)
        grams[mode] = _gram(units[mode])
    product = flat.T @ khatri_rao(units[:-1])
    factor = _solve(product, grams, last, ridge)
    # At the minimum over the last factor F the objective is ‖X‖² − ⟨product, F⟩.
    objective = 1 - float((double(product) * factor).sum()) / norm2
    unit, sizes = _normalised(factor)
    units[last] = unit.to(tensor)
    return Components(units, sizes.to(tensor), max(objective, 0.0))


def _solve(product: Tensor, grams: list[Tensor], mode: int, ridge: float) -> Tensor:
    """The factor of one mode, in float64, that minimises the objective. The others are fixed, with unit columns."""
    system = torch.stack([gram for m, gram in enumerate(grams) if m != mode]).prod(0)
    # Unit columns have a unit diagonal. Writing it also keeps columns of zeros from making the matrix singular.
    system.fill_diagonal_(1 + ridge)
    return torch.cholesky_solve(double(product).T, torch.linalg.cholesky(system)).T


def _square(tensor: Tensor) -> float:
    """‖X‖²."""
    return float(double(tensor).square().sum())


def _gram(unit: Tensor) -> Tensor:
    """The Gram matrix in float64; with nearly collinear components float32 would leave few digits."""
    wide = double(unit)
    return wide.T @ wide


def _normalised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix with unit columns, and the former norms; columns of zeros stay zero."""
    norms = torch.linalg.vector_norm(matrix, dim=0)
    return matrix / torch.where(norms > 0, norms, 1.0), norms
