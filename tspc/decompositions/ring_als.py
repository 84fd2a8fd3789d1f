"""Alternating least squares for tensor rings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tspc.decompositions.descent import Steps, descend
from tspc.decompositions.kernels import double

RIDGES = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How much a change of a core counts, relative to the mean of the normal equations' diagonal. A ring's cores can be
nearly dependent; so the equations stay solvable in the tensor's precision, and the sweeps end where they would anyway.
"""
STEPS = Steps(first=0.5, longest=0.5)
"""Longer steps lead to large cores that cancel each other. Refining in function space then gains less."""
WIDEST = 4096
"""With more pairs of bonds than this at a core, the normal equations take too much memory: the start is the result."""
EXACT = 1e-14
"""At this squared relative error the sweeps end."""
LARGE = 100.0
"""If the product of the cores' norms is so many times ‖X‖, parts of the ring cancel each other. Then the normal
equations are float64, and errors are those of the rebuilt tensor."""
NOISE = 1e-4
"""Below this squared relative error, the difference of two squares in float32 is too inexact."""


def opened(cores: Sequence[Tensor]) -> Tensor:
    """Neighbouring cores contracted to one: R × (all their modes) × R'."""
    result = cores[0]
    for core in cores[1:]:
        result = torch.tensordot(result, core, dims=1).flatten(1, 2)
    return result


def contracted(cores: Sequence[Tensor]) -> Tensor:
    """The tensor that a ring represents; differentiable in the cores."""
    dims = [core.shape[1] for core in cores]
    half = min(range(1, len(dims)), key=lambda k: math.prod(dims[:k]) + math.prod(dims[k:]))
    return torch.einsum("amb,bna->mn", opened(cores[:half]), opened(cores[half:])).reshape(dims)


def balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same ring; all cores have the same norm."""
    norms = [float(torch.linalg.vector_norm(core)) for core in cores]
    mean = math.prod(norm ** (1 / len(norms)) for norm in norms)
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)] if mean > 0 else list(cores)


@dataclass(frozen=True)
class _Ring:
    """The cores, with equal norms, and the squared error."""

    parts: list[Tensor]
    objective: float


def alternate(tensor: Tensor, start: list[Tensor], max_iterations: int, tolerance: float) -> list[Tensor]:
    """Sweeps over the cores until the relative error stops falling; returns the cores with the least error.

    `start` must be a projection of the tensor with orthonormal cores but the last, as TR-SVD gives it.
    """
    norm2 = _square(tensor)
    least = _left(tensor, norm2, _square(start[-1]), start)
    widest = max(core.shape[0] * core.shape[2] for core in start)
    if widest > WIDEST or least <= EXACT * norm2:
        return start
    # The products with the tensor take the least time if the ring is cut where its bonds are small.
    cut = min(range(1, len(start)), key=lambda k: (start[k].shape[0], abs(len(start) - 2 * k)))

    def sweep(parts: Sequence[Tensor]) -> _Ring:
        cores, squared = _sweep(tensor, norm2, parts, cut)
        return _Ring(balanced(cores), squared)

    return descend(_Ring(balanced(start), least), sweep, max_iterations, tolerance, STEPS).parts


def _left(tensor: Tensor, norm2: float, held: float, cores: Sequence[Tensor]) -> float:
    """The squared error of a ring that holds so much of ‖X‖²."""
    if norm2 - held > NOISE * norm2 and not _cancels(cores, norm2):
        return norm2 - held
    return _square(tensor - contracted(cores))


def _cancels(cores: Sequence[Tensor], norm2: float) -> bool:
    return math.prod(float(torch.linalg.vector_norm(core)) for core in cores) > LARGE * math.sqrt(norm2)


def _sweep(tensor: Tensor, norm2: float, cores: Sequence[Tensor], cut: int) -> tuple[list[Tensor], float]:
    """Solves for one core after the other; also the squared error.

    The ring is cut in two parts. All cores of a part share one contraction of the tensor with the other part (a
    dimension tree; Phan, Tichavský & Cichocki, IEEE TSP 2013). So a sweep reads the tensor only twice.
    """
    cores = list(cores)
    matrix = tensor.reshape(math.prod(tensor.shape[:cut]), -1)
    wide = double if _cancels(cores, norm2) else torch.clone
    transfers = [tensor, *(_transfer(wide(core)) for core in cores[1:])]  # the first is not needed before it is known
    fitted = 0.0
    for part, flat in ((range(cut), matrix), (range(cut, len(cores)), matrix.T)):
        others = [*range(part.stop, len(cores)), *range(part.start)]
        rest = opened([cores[i] for i in others])  # after the part × modes × before the part
        after, _, before = rest.shape
        shared = (flat @ rest.permute(1, 2, 0).flatten(1)).reshape(-1, before, after).movedim(0, 1)
        for k in part:
            product = _within(shared, cores, part, k)
            system = _chained([transfers[i] for i in (*range(k + 1, len(cores)), *range(k))])
            cores[k], fitted = _solved(product, system, cores[k])
            if k + 1 < len(cores):
                transfers[k] = _transfer(wide(cores[k]))
    return cores, _left(tensor, norm2, fitted, cores)


def _chained(matrices: list[Tensor]) -> Tensor:
    return torch.linalg.multi_dot(matrices) if len(matrices) > 1 else matrices[0]


def _within(shared: Tensor, cores: Sequence[Tensor], part: range, k: int) -> Tensor:
    """Contracts before × (modes of the part) × after with the part's other cores: before' × n_k × after'."""
    earlier, later = range(part.start, k), range(k + 1, part.stop)
    if earlier:
        left = opened([cores[i] for i in earlier]).flatten(0, 1)
        shared = (left.T @ shared.reshape(len(left), -1)).reshape(left.shape[1], -1, shared.shape[2])
    if later:
        right = opened([cores[i] for i in later]).flatten(1)
        shared = (shared.reshape(-1, right.shape[1]) @ right.T).reshape(len(shared), cores[k].shape[1], -1)
    return shared


def _solved(product: Tensor, system: Tensor, old: Tensor) -> tuple[Tensor, float]:
    """The core with the least error, by the normal equations, and how much of ‖X‖² the ring then holds."""
    before, n, after = product.shape
    pairs = before * after
    # From (after, after') × (before, before') to (before, after) × (before', after').
    gram = system.reshape(after, after, before, before).permute(2, 0, 3, 1).reshape(pairs, pairs)
    wanted, known = (t.to(gram).transpose(1, 2).reshape(pairs, n) for t in (product, old))
    rest = wanted - gram @ known
    rounding = 4 * torch.finfo(gram.dtype).eps * float(torch.linalg.vector_norm(gram))
    ridge = max(RIDGES[gram.dtype] * float(gram.diagonal().mean()), rounding)
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    while int(failed) and math.isfinite(ridge):  # rounding has made it indefinite
        gram.diagonal().add_(9 * ridge)
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(gram)
    change = torch.cholesky_solve(rest, factor)
    core = (known + change).reshape(before, after, n).transpose(1, 2).to(old).contiguous()
    # ‖X‖² − ‖X − X̂‖² is ⟨wanted + rest, known⟩ at the old core, and this much more at the new one.
    return core, _dot(wanted + rest, known) + _dot(rest, change) + ridge * _dot(change, change)


def _transfer(core: Tensor) -> Tensor:
    """Σ_n C(a, n, b) C(a', n, b') as a matrix (a, a') × (b, b')."""
    before, n, after = core.shape
    rows = core.transpose(0, 1).reshape(n, -1)
    return (rows.T @ rows).reshape(before, after, before, after).transpose(1, 2).reshape(before**2, after**2)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((double(a) * double(b)).sum())


def _square(tensor: Tensor) -> float:
    return float(double(tensor).square().sum())
