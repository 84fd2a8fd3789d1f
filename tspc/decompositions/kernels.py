"""Kernels and their factors: shapes, ranks, and the modes on the axes of a factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tspc.errors import DecompositionError

Shape = tuple[int, ...]
Rank = tuple[int, ...]


@dataclass(frozen=True)
class Factors:
    """The tensors that replace one kernel.

    `shape` is the shape of the kernel: (T, S, H, W) for a convolution, (T, S) for a dense layer. T is the number of
    output channels, S of input channels. `rank` has one entry for each bond of the method. `basis` is what `id` keeps
    beside its factors, in bytes (uint8).
    """

    tensors: tuple[Tensor, ...]
    shape: Shape
    rank: Rank
    basis: Tensor | None = None


@dataclass(frozen=True)
class Axes:
    """The modes of a kernel, and their places on the axes of its factors.

    As a matrix, the kernel has T rows and S·H·W columns. `outputs` names the modes of the rows, and `inputs` those of
    the columns, in order, with their sizes. `factors` has, for each factor and each of its axes, the modes on that
    axis: none for a bond, several if the axis merges them.
    """

    outputs: dict[str, int]
    inputs: dict[str, int]
    factors: tuple[tuple[tuple[str, ...], ...], ...]

    @property
    def modes(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """The kernel's modes alone: outputs, then inputs."""
        return tuple(self.outputs.items()), tuple(self.inputs.items())


def levels(tensors: Sequence[Tensor]) -> list[float]:
    """For each factor a power of two: times these, all have entries of about one size, and the kernel is the same.

    Steps of an optimizer such as Adam have one size for all entries. A factor with much smaller entries than another
    would change too fast, or the other one too slowly. Powers of two round nothing.
    """
    wide = [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    sizes = [float(torch.linalg.vector_norm(t)) / math.sqrt(max(t.numel(), 1)) for t in wide]
    if not all(0 < size < math.inf for size in sizes):
        return [1.0] * len(sizes)
    mean = math.fsum(map(math.log2, sizes)) / len(sizes)
    wanted = accumulate((mean - math.log2(size) for size in sizes), initial=0.0)
    return [2.0 ** (b - a) for a, b in pairwise(map(round, wanted))]  # the exponents add up to zero


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if its device has no float64."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def check_finite(weight: Tensor) -> None:
    """Raises DecompositionError for a kernel with NaN or infinite entries."""
    # A finite sum is a quick proof; an infinite sum may be an overflow only.
    if not weight.sum().isfinite() and not weight.isfinite().all():
        shape = tuple(weight.shape)
        raise DecompositionError(f"the kernel of shape {shape} holds NaN or infinite values; mend the weights first")


def kernel_dims(shape: Shape) -> tuple[int, int, int, int]:
    """(T, S, H, W) of a kernel; a dense layer counts as H = W = 1."""
    if len(shape) == 2:
        return (*shape, 1, 1)  # pyright: ignore[reportReturnType]
    if len(shape) == 4:
        return shape  # pyright: ignore[reportReturnType]
    raise DecompositionError(f"kernel of shape {shape}: expected (T, S, H, W) of a Conv2d or (T, S) of a Linear")


def is_matrix(shape: Shape) -> bool:
    """Whether the kernel has no spatial extent: a dense layer or a 1×1 convolution."""
    *_, h, w = kernel_dims(shape)
    return h * w == 1
