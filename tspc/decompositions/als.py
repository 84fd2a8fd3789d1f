"""Alternating least squares for the canonical polyadic decomposition, with bounded components.

What is minimised is ‖X − X̂‖² + μ Σ_r ‖x_r‖² over sums X̂ = Σ_r x_r of R rank-one tensors. The second term keeps
components from growing without bound while they cancel each other (Phan et al., "Stable low-rank tensor
decomposition for compression of convolutional neural network", ECCV 2020). No solve leaves the objective above
‖X‖², what zero factors give, so every component stays below ‖X‖ / √μ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tspc.decompositions.kernels import double
from tspc.decompositions.linalg import dominant_basis, projected

FIRST_STEP, LONGEST_STEP, GROWTH = 1.0, 1.5, 1.1
"""How far a sweep starts ahead of the last one, in units of what that one changed."""
NARROW, SHARE = 64, 0.6
"""Most directions of a mode that a projection keeps, in number or as a share of all of them."""


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product: matrices n_i × R give ∏n_i × R, the first index slowest."""
    result = matrices[0]
    for matrix in matrices[1:]:
        result = (result[:, None, :] * matrix[None, :, :]).reshape(-1, result.shape[1])
    return result


@dataclass(frozen=True)
class Components:
    """Σ_r size_r · u_r ∘ v_r ∘ … : one n_i × R matrix of unit columns a mode, and R sizes.

    `objective` is what is minimised, relative to ‖X‖²; infinite before it is known.
    """

    units: list[Tensor]
    sizes: Tensor
    objective: float = math.inf

    def factors(self) -> list[Tensor]:
        """n_i × R matrices in which every component has the same norm in all modes."""
        share = self.sizes ** (1 / len(self.units))
        return [unit * share for unit in self.units]


def slice_svd(tensor: Tensor, rank: int) -> Components:
    """The `rank` largest singular triplets of the slices over the last two modes.

    The other modes are turned to their principal axes first. The components are orthogonal, the error cannot
    rise with the rank, and at the highest rank there is none.
    """
    *small, rows, columns = tensor.shape
    axes = []
    for mode, n in enumerate(small):
        axes.append(dominant_basis(tensor.movedim(mode, 0).reshape(n, -1), n))
        tensor = torch.tensordot(axes[-1].T, tensor.movedim(mode, 0), dims=1).movedim(0, mode)
    slices = tensor.reshape(-1, rows, columns)
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
    """A tensor projected on the dominant subspaces of its large modes: their bases are n_i × q_i.

    `share` is the part of ‖X‖² that `core` still holds.
    """

    core: Tensor
    bases: dict[int, Tensor]
    share: float = 1.0

    def lifted(self, found: Components) -> Components:
        """Components of `core` as components of the tensor."""
        units = [self.bases[mode] @ unit if mode in self.bases else unit for mode, unit in enumerate(found.units)]
        return Components(units, found.sizes, 1 - (1 - found.objective) * self.share)


def project(tensor: Tensor, rank: int) -> Projection:
    """Sums of R components lie in subspaces of R dimensions, of which the dominant ones are nearly the best.

    Sweeps within them cost a fraction of those over the whole tensor (CANDELINC: Carroll, Pruzansky & Kruskal,
    Psychometrika 1980; Bro & Andersson, Chemometr. Intell. Lab. Syst. 1998). Nothing is projected where too
    little would be left for R components.
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

    A `start` whose objective is not known has orthogonal components, or none of any size. One small gain is no
    end, the sweeps may be leaving a saddle; two in a row are.

    Each sweep starts from directions extrapolated along the last change, and is taken back where that went too
    far (Ang, Cohen, Gillis & Hien, "Accelerating block coordinate descent for nonnegative tensor factorization",
    Numer. Linear Algebra Appl. 2021).
    """
    norm2 = _square(tensor)
    if norm2 == 0:
        return start
    if math.isinf(start.objective):
        captured = _square(start.sizes) / norm2
        start = replace(start, objective=1 - (1 - ridge) * captured)
    best = guess = start
    step, slow = FIRST_STEP, False
    for _ in range(max_iterations):
        found = _sweep(tensor, norm2, guess.units, ridge)
        gain = best.objective - found.objective
        if gain <= 0:
            if guess is best:
                break
            guess, step = best, step / 2
            continue
        was_slow, slow = slow, gain <= 2 * tolerance * found.objective
        if slow and was_slow:
            return found
        ahead = [new + step * (new - old) for new, old in zip(found.units, best.units, strict=True)]
        guess = Components([_normalised(unit)[0] for unit in ahead], found.sizes)
        best, step = found, min(step * GROWTH, LONGEST_STEP)
    return best


def _sweep(tensor: Tensor, norm2: float, units: list[Tensor], ridge: float) -> Components:
    """One pass over all modes, without a reconstruction.

    All modes but the last share one contraction of the tensor with the last matrix (a dimension tree of
    depth two; Phan, Tichavský & Cichocki, IEEE TSP 2013), so that a sweep reads the tensor twice.
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
    """The factor of one mode that minimises the objective while the others, of unit columns, stay; float64."""
    system = torch.stack([gram for m, gram in enumerate(grams) if m != mode]).prod(0)
    # Unit columns have a unit diagonal; writing it also makes room for columns that vanished.
    system.fill_diagonal_(1 + ridge)
    return torch.cholesky_solve(double(product).T, torch.linalg.cholesky(system)).T


def _square(tensor: Tensor) -> float:
    """‖X‖²."""
    return float(double(tensor).square().sum())


def _gram(unit: Tensor) -> Tensor:
    """In float64: nearly collinear components leave the normal equations few digits."""
    wide = double(unit)
    return wide.T @ wide


def _normalised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Unit columns and their former norms; columns of zeros stay."""
    norms = torch.linalg.vector_norm(matrix, dim=0)
    return matrix / torch.where(norms > 0, norms, 1.0), norms
