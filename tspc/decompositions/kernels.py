"""Kernels and their factors: shapes, ranks, and which modes the axes of a factor carry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tspc.errors import DecompositionError

Shape = tuple[int, ...]
Rank = tuple[int, ...]


@dataclass(frozen=True)
class Factors:
    """The tensors that replace one kernel.

    `shape` is the kernel's own: (T, S, H, W) for a convolution, (T, S) for a dense layer, where T counts
    output and S input channels. `rank` has one entry for each bond of the method.
    """

    tensors: tuple[Tensor, ...]
    shape: Shape
    rank: Rank


@dataclass(frozen=True)
class Axes:
    """Which of a kernel's modes the axes of its factors carry.

    `outputs` and `inputs` name the modes that the T rows and the S·H·W columns of the kernel as a matrix are made of,
    in order, with their sizes. `factors` has, for each factor, the modes that each of its axes carries: none for a
    bond, several where an axis merges them.
    """

    outputs: dict[str, int]
    inputs: dict[str, int]
    factors: tuple[tuple[tuple[str, ...], ...], ...]

    @property
    def modes(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """The kernel's modes, whatever the factors."""
        return tuple(self.outputs.items()), tuple(self.inputs.items())


def double(tensor: Tensor) -> Tensor:
    """In float64; on the CPU if the tensor's device has no such numbers."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def check_finite(weight: Tensor) -> None:
    """Raises DecompositionError for a kernel with NaN or infinite entries."""
    # A finite sum is quick proof; an infinite one may be an overflow.
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
