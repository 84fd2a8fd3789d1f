"""`tk`: partial Tucker decomposition over the channel modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tspc.decompositions import oracle
from tspc.decompositions.formats import Swept, TensorFormat
from tspc.decompositions.kernels import Axes, Rank, Shape, kernel_dims
from tspc.decompositions.linalg import dominant_basis, mode_product, projected, unfold
from tspc.decompositions.registry import register


def _energy(tensor: Tensor) -> float:
    return float(tensor.square().sum())


@dataclass(frozen=True)
class TuckerFormat(TensorFormat):
    """A core times an n_i × R_i matrix for every mode except the spatial one.

    Factors: the matrices, then the core. The fit is a sequentially truncated HOSVD (Vannieuwenhoven, Vandebril &
    Meerbergen, SIAM J. Sci. Comput. 2012), then HOOI sweeps (De Lathauwer, De Moor & Vandewalle, SIAM J. Matrix Anal.
    Appl. 2000). No sweep is worse than the one before.
    """

    max_iterations: int
    tolerance: float
    solver: str = "native"
    pairs_channels: ClassVar[bool] = False
    is_spectral: ClassVar[bool] = True

    def max_rank(self, dims: Shape, spatial: bool) -> Rank:
        size = math.prod(dims)
        return tuple(min(n, size // n) for n in dims[: len(dims) - spatial])

    def is_useful(self, dims: Shape, rank: Rank) -> bool:
        core = math.prod(rank) * math.prod(dims[len(rank) :])
        return all(r <= core // r for r in rank)

    def factor_shapes(self, dims: Shape, spatial: bool, rank: Rank) -> tuple[Shape, ...]:
        matrices = tuple(zip(dims[: len(rank)], rank, strict=True))
        return (*matrices, (*rank, *dims[len(rank) :]))

    def fit(self, tensor: Tensor, rank: Rank) -> list[Tensor]:
        if self.solver == "tensorly":
            return oracle.tucker(tensor, rank, self.max_iterations, self.tolerance)
        # The first and the last mode can be contracted without a copy, so the mode without a matrix is in the middle.
        count, half = len(rank), (len(rank) + 1) // 2
        layout = [*range(half), *range(count, tensor.ndim), *range(half, count)]
        axes = [layout.index(mode) for mode in range(count)]
        tensor = tensor.permute(layout).contiguous()
        core, bases = projected(tensor, {axis: rank[axes.index(axis)] for axis in _outermost_first(axes, tensor)})
        total, captured = _energy(tensor), _energy(core)
        for _ in range(self.max_iterations):
            core = mode_product(_sweep(tensor, axes, bases), bases[axes[-1]].T, axes[-1])
            energy = _energy(core)
            gain, captured = energy - captured, energy
            if gain <= 2 * self.tolerance * (total - captured):
                break
        return [*(bases[axis] for axis in axes), core.permute([layout.index(mode) for mode in range(core.ndim)])]

    def axes(self, modes: Sequence[tuple[str, ...]], spatial: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        matrices = modes[: len(modes) - spatial]
        return (*((mode, ()) for mode in matrices), (*(() for _ in matrices), *modes[len(matrices) :]))

    def unfoldings(self, tensor: Tensor, spatial: bool) -> tuple[Tensor, ...]:
        return tuple(unfold(tensor, mode) for mode in range(tensor.ndim - spatial))

    def contract(self, tensors: Sequence[Tensor]) -> Tensor:
        *matrices, result = tensors
        for mode, matrix in enumerate(matrices):
            result = mode_product(result, matrix, mode)
        return result


def _outermost_first(axes: list[int], tensor: Tensor) -> list[int]:
    return sorted(axes, key=lambda axis: min(axis, tensor.ndim - 1 - axis))


def _sweep(tensor: Tensor, axes: list[int], bases: dict[int, Tensor]) -> Tensor:
    """Computes the bases of `axes` again, one after the other. Returns the tensor projected on all but the last.

    The modes are halved, so that each half shares one projection of the whole tensor on the other half.
    """
    if len(axes) == 1:
        (axis,) = axes
        bases[axis] = dominant_basis(unfold(tensor, axis), bases[axis].shape[1], start=bases[axis])
        return tensor
    half = (len(axes) + 1) // 2
    rest = tensor
    for kept, dropped in ((axes[:half], axes[half:]), (axes[half:], axes[:half])):
        rest = tensor
        for axis in _outermost_first(dropped, tensor):
            rest = mode_product(rest, bases[axis].T, axis)
        rest = _sweep(rest, kept, bases)
    return rest


# A reshaped kernel has twice as many bases that depend on each other, so its sweeps converge more slowly.
@register(reshaped={"order": 2, "tolerance": 2e-4})
@dataclass(frozen=True)
class Tucker(Swept):
    """K(s, h, w, t) = Σ A(s, r1) G(r1, r2, h, w) B(r2, t); S·R1 + R1·R2·HW + R2·T parameters.

    Chain: 1×1 convolution S → R1, H×W convolution R1 → R2, 1×1 convolution R2 → T. Kim et al., ICLR
    2016; arXiv:1805.10352, section 3.
    """

    name: ClassVar[str] = "tk"

    @property
    def format(self) -> TuckerFormat:
        return TuckerFormat(self.max_iterations, self.tolerance, self.solver)

    def max_rank(self, shape: Shape) -> Rank:
        t, s, h, w = kernel_dims(shape)
        return self.format.max_rank((s, t, h * w), True)

    def is_useful(self, shape: Shape, rank: Rank) -> bool:
        t, s, h, w = kernel_dims(shape)
        return self.format.is_useful((s, t, h * w), rank)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        t, s, h, w = kernel_dims(shape)
        r1, r2 = rank
        return (r1, s, 1, 1), (r2, r1, h, w), (t, r2, 1, 1)

    def axes(self, shape: Shape) -> Axes:
        t, s, h, w = kernel_dims(shape)
        inputs, core, outputs = ((), ("s",), (), ()), ((), (), ("h",), ("w",)), (("t",), (), (), ())
        return Axes({"t": t}, {"s": s, "h": h, "w": w}, (inputs, core, outputs))

    def chain_axes(self, shape: Shape) -> tuple[str, ...]:
        return "", "hw", ""

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        shape = tuple(weight.shape)
        t, s, h, w = kernel_dims(shape)
        inputs, outputs, core = self.format.fit(weight.permute(1, 0, 2, 3).reshape(s, t, h * w), rank)
        tensors = inputs.T, core.movedim(0, 1), outputs
        return [f.reshape(k) for f, k in zip(tensors, self.factor_shapes(shape, rank), strict=True)]

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.format.unfoldings(weight.flatten(2).permute(1, 0, 2), True)

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        inputs, core, outputs = tensors
        return torch.einsum("as,bahw,tb->tshw", inputs[:, :, 0, 0], core, outputs[:, :, 0, 0])
