"""`cp`: canonical polyadic decomposition by alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tspc.decompositions import oracle
from tspc.decompositions.als import Components, alternate, gaussian, khatri_rao, project, slice_spectrum, slice_svd
from tspc.decompositions.formats import Formatted, TensorFormat
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, double, kernel_dims
from tspc.decompositions.linalg import squared_singular_values, truncated_svd
from tspc.decompositions.registry import register
from tspc.decompositions.settings import SWEEPS, require
from tspc.system.bounds import SEEDS, SHARE, Bounds

SKETCH_SWEEPS = 4
"""Sweeps of a sketch; they show the approximate error."""
FINISHING, LAX = 5, 10.0
"""Sweeps over the whole tensor, after those over its projection, are at most one to so many of these, and end at a
gain larger by this factor."""
RIDGE = 1e-6
"""Weight of the components' squared norms in a first fit; it hardly limits their growth."""


def component_norms(tensors: Sequence[Tensor]) -> Tensor:
    """‖a_r ∘ b_r ∘ …‖ of every component: R norms from n_i × R matrices."""
    return torch.stack([torch.linalg.vector_norm(t, dim=0) for t in tensors]).prod(0)


@dataclass(frozen=True)
class CPFormat(TensorFormat):
    """X = Σ_r a_r ∘ b_r ∘ … : an n_i × R matrix for each mode (Kolda & Bader, SIAM Review 2009, section 3)."""

    max_iterations: int
    tolerance: float
    seed: int = 0
    restarts: int = 1
    max_component_norm: float = 10.0
    solver: str = "native"
    pairs_channels: ClassVar[bool] = True

    def max_rank(self, dims: Shape, spatial: bool) -> Rank:
        # Unit vectors in all modes except the largest are exact; fewer terms may not be.
        return (math.prod(dims) // max(dims),)

    def factor_shapes(self, dims: Shape, spatial: bool, rank: Rank) -> tuple[Shape, ...]:
        return tuple((n, rank[0]) for n in dims)

    def fit(self, tensor: Tensor, rank: Rank) -> list[Tensor]:
        (r,) = rank
        if tensor.ndim == 2:
            left, right = (oracle.svd if self.solver == "tensorly" else truncated_svd)(tensor, r)
            return [left, right.T]
        if self.solver == "tensorly":
            return oracle.cp(tensor, r, self.max_iterations, self.tolerance, self.seed)
        order = _ascending(tensor)
        factors = self._best(tensor.permute(order).contiguous(), r)
        return [factors[order.index(mode)] for mode in range(tensor.ndim)]

    def axes(self, modes: Sequence[tuple[str, ...]], spatial: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        return tuple((mode, ()) for mode in modes)

    def unfoldings(self, tensor: Tensor, spatial: bool) -> tuple[Tensor, ...]:
        # No unfolding bounds the rank of CP; the one of the largest mode shows most of the spectrum.
        largest = max(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
        return (tensor.movedim(largest, 0).flatten(1),)

    def spectra(self, tensor: Tensor, spatial: bool, squares: Callable[[Tensor], Tensor]) -> list[Tensor]:
        if tensor.ndim == 2:
            return [squares(tensor)]
        return [slice_spectrum(tensor.permute(_ascending(tensor)))]  # of the start

    def contract(self, tensors: Sequence[Tensor]) -> Tensor:
        dims = [f.shape[0] for f in tensors]
        # Split into two small matrices: a Khatri-Rao product over most modes would be as large as X·R.
        half = min(range(1, len(dims)), key=lambda k: math.prod(dims[:k]) + math.prod(dims[k:]))
        return (khatri_rao(tensors[:half]) @ khatri_rao(tensors[half:]).T).reshape(dims)

    def profiles(self, last: Tensor) -> Tensor:
        return last.T

    def from_profiles(self, profiles: Tensor, rank: Rank) -> Tensor:
        return profiles.T

    def diagnose(self, tensors: Sequence[Tensor]) -> str | None:
        """Says if components cancel each other: each is large, and their sum is small."""
        if len(tensors) == 2:
            return None
        total = float(torch.stack([t.T @ t for t in map(double, tensors)]).prod(0).sum().clamp(min=0).sqrt())
        largest = float(component_norms(tensors).max())
        if largest <= self.max_component_norm * total:
            return None
        return f"degenerate: components of norm {largest / total:.3g} ‖K‖ cancel each other"

    def _best(self, tensor: Tensor, rank: int) -> list[Tensor]:
        """The best of all starts. The fit is repeated with a larger ridge while components exceed their bound."""
        if (rank,) == self.max_rank(tuple(tensor.shape), False):
            return slice_svd(tensor, rank).factors()
        projection = project(tensor, rank)
        generator = torch.Generator().manual_seed(self.seed)
        randoms = (gaussian(projection.core, rank, generator) for _ in range(self.restarts - 1))
        starts = [slice_svd(projection.core, rank), *randoms]

        def best(ridge: float) -> list[Tensor]:
            fits = [self._alternate(projection.core, start, ridge) for start in starts]
            found = min(fits, key=lambda fit: fit.objective)
            if projection.bases:
                found = self._finish(tensor, projection.lifted(found), ridge)
            return found.factors()

        # At the last of these ridges no component can exceed the bound.
        ridge, last = RIDGE, self.max_component_norm**-2
        factors = best(ridge)
        while self.diagnose(factors) is not None and ridge < last:
            ridge = min(10 * ridge, last)
            factors = best(ridge)
        return factors

    def _alternate(self, tensor: Tensor, start: Components, ridge: float) -> Components:
        return alternate(tensor, start, ridge, self.max_iterations, self.tolerance)

    def _finish(self, tensor: Tensor, start: Components, ridge: float) -> Components:
        return alternate(tensor, start, ridge, max(1, self.max_iterations // FINISHING), LAX * self.tolerance)


def _ascending(tensor: Tensor) -> list[int]:
    """The modes with the two largest ones last.

    The start takes the singular vectors of the slices over them, and the contraction with the last one leaves the
    smallest tensor for the others.
    """
    return sorted(range(tensor.ndim), key=lambda mode: tensor.shape[mode])


@register(reshaped={"order": 2})
@dataclass(frozen=True)
class CP(Formatted):
    """K(s, h, w, t) = Σ_r A(s, r) B(hw, r) C(t, r); R(S + HW + T) parameters.

    Chain: 1×1 convolution S → R, depthwise H×W, 1×1 convolution R → T. Lebedev et al., ICLR 2015
    (with the two spatial modes as one); arXiv:1805.10352, section 3.
    """

    name: ClassVar[str] = "cp"
    max_iterations: int = 20
    tolerance: float = 1e-4
    restarts: int = 1
    max_component_norm: float = 10.0
    solver: str = "native"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "max_iterations", SWEEPS)
        require(self, "tolerance", SHARE)
        require(self, "restarts", SWEEPS)
        require(self, "max_component_norm", Bounds(1, 1e12), "in multiples of ‖K‖")
        require(self, "seed", SEEDS)
        require(self, "solver", oracle.SOLVERS)

    @property
    def format(self) -> CPFormat:
        return CPFormat(
            self.max_iterations, self.tolerance, self.seed, self.restarts, self.max_component_norm, self.solver
        )

    def sketch(self) -> CP:
        return replace(self, max_iterations=min(self.max_iterations, SKETCH_SWEEPS))

    def max_rank(self, shape: Shape) -> Rank:
        t, s, h, w = kernel_dims(shape)
        return self.format.max_rank((s, h * w, t), True)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        t, s, h, w = kernel_dims(shape)
        (r,) = rank
        return (r, s, 1, 1), (r, 1, h, w), (t, r, 1, 1)

    def axes(self, shape: Shape) -> Axes:
        t, s, h, w = kernel_dims(shape)
        inputs, space, outputs = ((), ("s",), (), ()), ((), (), ("h",), ("w",)), (("t",), (), (), ())
        return Axes({"t": t}, {"s": s, "h": h, "w": w}, (inputs, space, outputs))

    def chain_axes(self, shape: Shape) -> tuple[str, ...]:
        return "", "hw", ""

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        shape = tuple(weight.shape)
        t, s, h, w = kernel_dims(shape)
        inputs, space, outputs = self.format.fit(weight.permute(1, 2, 3, 0).reshape(s, h * w, t), rank)
        tensors = inputs.T, space.T, outputs
        return [f.reshape(k) for f, k in zip(tensors, self.factor_shapes(shape, rank), strict=True)]

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.format.unfoldings(weight.flatten(2).permute(1, 2, 0), True)

    def course(self) -> CP:
        return self

    def spectra(self, weight: Tensor, squares: Callable[[Tensor], Tensor] = squared_singular_values) -> list[Tensor]:
        return self.format.spectra(weight.flatten(2).permute(1, 2, 0), True, squares)

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        inputs, space, outputs = tensors
        return torch.einsum("rs,rhw,tr->tshw", inputs[:, :, 0, 0], space[:, 0], outputs[:, :, 0, 0])

    def diagnose(self, factors: Factors) -> str | None:
        inputs, space, outputs = factors.tensors
        return self.format.diagnose([inputs[:, :, 0, 0].T, space.flatten(1).T, outputs[:, :, 0, 0]])
