"""Improves all factors of a decomposition together, in a norm that does not separate them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tspc.decompositions.metric import Metric

INNER = 10
"""The largest number of conjugate gradient steps in a Levenberg-Marquardt step."""
STALLED = 1e-3
"""Refining ends when the squared error falls by less than this share."""


def refine(
    contract: Callable[[Sequence[Tensor]], Tensor],
    start: Sequence[Tensor],
    target: Tensor,
    metric: Metric,
    steps: int,
    stalled: float = STALLED,
    offset: float = 0.0,
) -> list[Tensor]:
    """Lowers ‖target − contract(tensors)‖ in `metric`; `contract` is linear in each tensor.

    Levenberg-Marquardt: every step solves (JᵀMJ + μI)p = JᵀM(target − contract) by conjugate gradients. The damping μ
    falls after a success and rises after a failure; it also holds the scales of the factors in place. The result is
    never worse than the start. A step is computed in float32 or less, which is enough for a direction, and judged in
    the precision of the tensors. All factors have the same damping, so they need equal norms and a target of norm 1.
    `offset` is a part of the squared error that no tensors can lower; it counts in the gain at which refining ends.
    """
    norms = [float(torch.linalg.vector_norm(t)) for t in start]
    size = math.sqrt(metric.squared(target))
    if not size * math.prod(norms) > 0:
        return [t.detach().clone() for t in start]
    share = size ** (1 / len(norms))
    mean = math.prod(norm / share for norm in norms) ** (1 / len(norms))
    tensors = [t.detach() * (mean / norm) for t, norm in zip(start, norms, strict=True)]
    target, offset = target / size, offset / size**2
    rest = target - contract(tensors)
    pulled = metric.apply(rest)
    loss = max(float((pulled * rest).sum()), 0.0)
    damping, scale = 1e-3, None
    narrow = metric.rough()
    for _ in range(steps):
        normal = _Normal(contract, [t.float() for t in tensors], narrow)
        gradient = normal.transposed(pulled.float())
        scale = normal.mean_diagonal() if scale is None else scale
        step = _conjugate_gradients(normal, gradient, damping * scale)
        if step is None:
            break
        tried = [t + p for t, p in zip(tensors, step, strict=True)]
        rest = target - contract(tried)
        pulled_now = metric.apply(rest)
        loss_now = max(float((pulled_now * rest).sum()), 0.0)
        if not loss_now < loss:
            damping *= 8
            continue
        fall, tensors, pulled, loss = (loss - loss_now) / (loss + offset), tried, pulled_now, loss_now
        damping = max(damping / 4, 1e-8)
        if fall < stalled:
            break
    return [t * share for t in tensors]


class _Normal:
    """The Gauss-Newton matrix JᵀMJ of the contraction at the given tensors, as an operator."""

    def __init__(self, contract: Callable[[Sequence[Tensor]], Tensor], tensors: list[Tensor], metric: Metric) -> None:
        with torch.enable_grad():
            self._leaves = [t.detach().requires_grad_() for t in tensors]
            self._value = contract(self._leaves)
        self._contract, self._tensors, self._metric = contract, tensors, metric

    def transposed(self, cotangent: Tensor) -> list[Tensor]:
        """Jᵀ times a difference of kernels."""
        return list(torch.autograd.grad(self._value, self._leaves, cotangent, retain_graph=True))

    def __call__(self, tangent: list[Tensor]) -> list[Tensor]:
        # Multilinear: the derivative along a tangent is a sum of contractions with one tensor replaced.
        parts = [self._contract([*self._tensors[:i], p, *self._tensors[i + 1 :]]) for i, p in enumerate(tangent)]
        moved = torch.stack(parts).sum(0)
        return self.transposed(self._metric.apply(moved.to(self._metric.inputs.dtype)).to(moved))

    def mean_diagonal(self) -> float:
        """Hutchinson's estimate of the mean diagonal entry, from one seeded random sign vector."""
        generator = torch.Generator().manual_seed(0)
        signs = [(torch.randint(0, 2, t.shape, generator=generator, device="cpu") * 2 - 1).to(t) for t in self._tensors]
        return max(_dot(signs, self(signs)) / sum(t.numel() for t in signs), torch.finfo(torch.float64).tiny)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _conjugate_gradients(normal: _Normal, right: list[Tensor], shift: float) -> list[Tensor] | None:
    """An approximation of (normal + shift)⁻¹ right; None if nothing is left to solve."""
    solution = [torch.zeros_like(t) for t in right]
    residual, direction = right, right
    size = first = _dot(residual, residual)
    if first == 0:
        return None
    for _ in range(INNER):
        image = [a + shift * p for a, p in zip(normal(direction), direction, strict=True)]
        curvature = _dot(direction, image)
        if not curvature > 0:
            break
        step = size / curvature
        solution = [x + step * p for x, p in zip(solution, direction, strict=True)]
        residual = [r - step * a for r, a in zip(residual, image, strict=True)]
        size, before = _dot(residual, residual), size
        if size < 1e-2 * first:
            break
        direction = [r + size / before * p for r, p in zip(residual, direction, strict=True)]
    return solution
