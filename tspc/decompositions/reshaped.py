"""The reshaped methods: they split the channels of a kernel into several modes, and apply a tensor format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from tspc.decompositions.base import Decomposition
from tspc.decompositions.formats import Formatted
from tspc.decompositions.kernels import Axes, Factors, Rank, Shape, kernel_dims
from tspc.decompositions.linalg import squared_singular_values
from tspc.decompositions.settings import require
from tspc.errors import DecompositionError
from tspc.system.bounds import Bounds, shown

MOST_MODES = 8
"""The largest number of modes for the channels. More have no use for 256 = 2 ** 8, and the splits would be too many."""


def balanced_factors(number: int, count: int) -> Shape:
    """`number` as a product of `count` integers in ascending order, with the smallest possible sum.

    A prime cannot be split: balanced_factors(7, 2) == (1, 7).
    """
    if count == 1:
        return (number,)
    root = round(number ** (1 / count)) + 1
    options = [
        tuple(sorted((d, *balanced_factors(number // d, count - 1)))) for d in range(1, root + 1) if number % d == 0
    ]
    return min(options, key=sum)


def _channels(shape: Shape, order: int) -> tuple[Shape, Shape]:
    t, s, *_ = kernel_dims(shape)
    return balanced_factors(s, order), balanced_factors(t, order)[::-1]


def _dims(shape: Shape, order: int, pairs_channels: bool) -> tuple[Shape, bool]:
    inputs, outputs = _channels(shape, order)
    *_, h, w = kernel_dims(shape)
    pairs = tuple(s * t for s, t in zip(inputs, outputs, strict=True))
    channels = pairs if pairs_channels else inputs + outputs
    return (*channels, h * w) if h * w > 1 else channels, h * w > 1


_known_channels, _known_dims = lru_cache(maxsize=4096)(_channels), lru_cache(maxsize=4096)(_dims)


@dataclass(frozen=True)
class Reshaped(Decomposition):
    """`inner`'s format on a kernel with S = S1·…·Sm and T = T1·…·Tm (arXiv:1805.10352, section 4).

    - CP: Σ_r of Kronecker products; R(Σ S_l·T_l + HW) parameters.
    - Tucker: a matrix for every S_l and T_l; the positions stay in the core.
    - tensor train: cores R_{l-1} × S_l·T_l × R_l, then R_m × HW (Novikov et al., NIPS 2015).
    - tensor ring: the same cores, and the last bond is the first one.

    A kernel without spatial extent has no H·W mode. `order` is m.
    """

    inner: Formatted
    order: int

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Formatted):
            raise DecompositionError(f"{shown(self.inner)} has no tensor format to apply to a reshaped kernel")
        require(self, "order", Bounds(2, MOST_MODES), "modes")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"r{self.inner.name}"

    def to_dict(self) -> dict[str, Any]:
        return self.inner.to_dict() | {"name": self.name, "order": self.order}

    def _channels(self, shape: Shape) -> tuple[Shape, Shape]:
        """Splits of S and of T, in opposite orders, so that the products S_l·T_l are similar."""
        # torch.compile traces the function anyway, and would warn of the cache.
        return (_channels if torch.compiler.is_compiling() else _known_channels)(shape, self.order)

    def _dims(self, shape: Shape) -> tuple[Shape, bool]:
        """Modes of the reshaped kernel, and whether the last one holds the kernel positions."""
        of = _dims if torch.compiler.is_compiling() else _known_dims
        return of(shape, self.order, self.inner.format.pairs_channels)

    def _split(self, weight: Tensor) -> Tensor:
        """Kernel → tensor with the modes of `_dims`."""
        shape = tuple(weight.shape)
        inputs, outputs = self._channels(shape)
        m = self.order
        tensor = weight.reshape(*outputs, *inputs, -1)
        if self.inner.format.pairs_channels:
            axes = [axis for i in range(m) for axis in (m + i, i)]
        else:
            axes = [*range(m, 2 * m), *range(m)]
        return tensor.permute(*axes, 2 * m).reshape(self._dims(shape)[0])

    def _join(self, tensor: Tensor, shape: Shape) -> Tensor:
        """The inverse of `_split`."""
        inputs, outputs = self._channels(shape)
        m = self.order
        if self.inner.format.pairs_channels:
            pairs = [n for pair in zip(inputs, outputs, strict=True) for n in pair]
            axes = [*range(1, 2 * m, 2), *range(0, 2 * m, 2)]
        else:
            pairs = [*inputs, *outputs]
            axes = [*range(m, 2 * m), *range(m)]
        return tensor.reshape(*pairs, -1).permute(*axes, 2 * m).reshape(shape)

    def axes(self, shape: Shape) -> Axes:
        inputs, outputs = self._channels(shape)
        *_, h, w = kernel_dims(shape)
        s = {f"s{i}": n for i, n in enumerate(inputs)}
        t = {f"t{i}": n for i, n in enumerate(outputs)}
        spatial = h * w > 1
        modes = list(zip(s, t, strict=True)) if self.inner.format.pairs_channels else [(name,) for name in (*s, *t)]
        modes += [("h", "w")] if spatial else []
        return Axes(t, s | ({"h": h, "w": w} if spatial else {}), self.inner.format.axes(modes, spatial))

    def links(self, shape: Shape, rank: Rank) -> tuple[tuple[Shape, str], ...] | None:
        """Two chains that cost less than the dense kernel.

        - Tucker: the matrices of the S_l together are one map S → ∏R_l of the channels (their Kronecker product), and
          those of the T_l are another map. The core convolves between them, as in `tk`.
        - CP and tensor train, if fewer than HW terms R share the positions: a depthwise convolution S → S·R with the
          same R kernels for each channel, then a map of the channels.
        """
        t, s, h, w = kernel_dims(shape)
        m = self.order
        if not self.inner.format.pairs_channels:
            first, last = math.prod(rank[:m]), math.prod(rank[m:])
            # The first convolution takes the stride of a 1×1 kernel, so the others see fewer positions.
            axes = ("hw", "", "") if h * w == 1 else ("", "hw", "")
            return tuple(zip(((first, s, 1, 1), (last, first, h, w), (t, last, 1, 1)), axes, strict=True))
        terms = self.inner.format.terms(rank)
        return (((s * terms, 1, h, w), "hw"), ((t, s * terms, 1, 1), "")) if terms < h * w else None

    def link_kernels(self, factors: Factors) -> list[Tensor]:
        t, s, h, w = kernel_dims(factors.shape)
        m = self.order
        *others, last = factors.tensors
        if not self.inner.format.pairs_channels:
            inputs, outputs = reduce(torch.kron, others[:m]), reduce(torch.kron, others[m:])
            core = last.reshape(inputs.shape[1], outputs.shape[1], h, w).transpose(0, 1)
            return [inputs.T[:, :, None, None], core, outputs[:, :, None, None]]
        profiles = self.inner.format.profiles(last)
        terms = len(profiles)
        unit = torch.eye(terms, dtype=last.dtype, device=last.device)
        unit = self.inner.format.from_profiles(unit, factors.rank)
        profiles = profiles.reshape(terms, h, w)
        maps = self._join(self.inner.format.contract([*others, unit]), (t, s, terms, 1))
        return [profiles.repeat(s, 1, 1)[:, None], maps.reshape(t, s * terms, 1, 1)]

    @property
    def is_spectral(self) -> bool:
        return self.inner.format.is_spectral

    def sketch(self) -> Reshaped:
        return replace(self, inner=self.inner.sketch())

    def max_rank(self, shape: Shape) -> Rank:
        return self.inner.format.max_rank(*self._dims(shape))

    def is_useful(self, shape: Shape, rank: Rank) -> bool:
        return self.inner.format.is_useful(self._dims(shape)[0], rank)

    def factor_shapes(self, shape: Shape, rank: Rank) -> tuple[Shape, ...]:
        return self.inner.format.factor_shapes(*self._dims(shape), rank)

    def fit(self, weight: Tensor, rank: Rank) -> Sequence[Tensor]:
        return self.inner.format.fit(self._split(weight), rank)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.inner.format.unfoldings(self._split(weight), self._dims(tuple(weight.shape))[1])

    def cuts(self, rank: Rank) -> Rank:
        return self.inner.format.cuts(rank)

    def course(self) -> Decomposition | None:
        inner = self.inner.reshaped_course()
        return None if inner is None else replace(self, inner=inner)

    def spectra(self, weight: Tensor, squares: Callable[[Tensor], Tensor] = squared_singular_values) -> list[Tensor]:
        return self.inner.format.spectra(self._split(weight), self._dims(tuple(weight.shape))[1], squares)

    def contract(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        return self._join(self.inner.format.contract(tensors), shape)

    def diagnose(self, factors: Factors) -> str | None:
        return self.inner.format.diagnose(factors.tensors)
