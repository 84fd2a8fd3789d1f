"""The layers that can be tensorized: their kernels, and how to run the same convolution with another kernel.

A table of embeddings (`nn.Embedding`) counts as a kernel with a row for each token. It has no decompositions; only its
entries can have fewer bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tspc.decompositions import Shape
from tspc.errors import DecompositionError
from tspc.layers.chains import Stage

DenseLayer = nn.Conv1d | nn.Conv2d | nn.Linear
"""Also transformers' `Conv1D`, a dense layer with its matrix transposed, told by its name and its attributes."""

EMBEDDING = "embedding"
"""The kind of a table: its rows are looked up, and no inputs are multiplied with it."""
AXES = {"conv1d": "w", "conv2d": "hw"}
"""The kernel's axes that each kind of convolution has."""


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "transposed" (linear), "conv1d", "conv2d" or "embedding"; None for other modules and subclasses."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module.weight, "ndim", 0) == 2:
        return "transposed"
    kinds = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Embedding: EMBEDDING}
    return kinds.get(type(module))  # type: ignore[call-overload]


def is_table(module: nn.Module) -> bool:
    """Whether a module is a table of embeddings."""
    return kind_of(module) == EMBEDDING


def has_inputs(module: nn.Module) -> bool:
    """Whether a module is a convolution or a dense layer of a known kind, which multiplies its inputs by a kernel."""
    return kind_of(module) not in (None, EMBEDDING)


def output_count(layer: nn.Module) -> int:
    """The number of entries of an output row: the output channels, or the length of an embedding."""
    return kernel_shape(layer)[-1 if is_table(layer) else 0]


def as_kernel(weight: Tensor, kind: str | None) -> Tensor:
    """A layer's weight as a kernel: (T, S) for a dense layer, (T, S of one group, H, W) for a convolution.

    In a 1-d convolution H is 1. A table is (tokens, length of an embedding).
    """
    if kind == "transposed":
        return weight.T
    return weight.unsqueeze(2) if kind == "conv1d" else weight


def as_weight(kernel: Tensor, kind: str | None) -> Tensor:
    """The inverse of `as_kernel`."""
    if kind == "transposed":
        return kernel.T
    return kernel.squeeze(2) if kind == "conv1d" else kernel


def kernel_of(layer: nn.Module) -> Tensor:
    """The kernel of a dense layer, or the rebuilt kernel of a tensorized layer; a view of its weight."""
    return as_kernel(layer.weight, getattr(layer, "kind", None) or kind_of(layer))  # type: ignore[arg-type]


def kernel_shape(layer: nn.Module) -> Shape:
    return tuple(kernel_of(layer).shape)


def shown_by(layer: nn.Module) -> dict[str, Any]:
    """The plain attributes of a layer that other code may read: sizes, stride, padding, and a user's own."""
    return {
        key: value
        for key, value in vars(layer).items()
        if (not key.startswith("_") and key not in ("training", "forward")) or key.startswith("_reversed_padding")
    }


def check_values(model: nn.Module) -> None:
    """Raises DecompositionError for a parameter with no, NaN or infinite values, or a buffer with NaN; it names it.

    The same holds for negative variances, because their roots are NaN. All layers are checked, also those that stay
    dense; otherwise the error would name a later layer. Infinite values in a buffer are allowed, as masks hold them.
    """
    for name, value in model.named_parameters():
        if value.is_meta:
            raise DecompositionError(f"{name} has no values (it is on the meta device): load the weights first")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        plain = value.layout == torch.strided and not value.is_meta and not is_lazy(value) and value.element_size() > 1
        if not plain or not (value.is_floating_point() or value.is_complex()):
            continue
        values = value.detach()
        if name.endswith("running_var") and values.numel() and values.min() < 0:
            raise DecompositionError(f"{name} holds negative variances; mend the weights first")
        # A finite sum is a quick proof; an infinite sum may be an overflow only.
        if values.sum().isfinite():
            continue
        wrong = ~values.isfinite() if isinstance(value, nn.Parameter) else values.isnan()
        if wrong.any():
            raise DecompositionError(f"{name} holds NaN or infinite values; mend the weights first")


@dataclass(frozen=True)
class Form:
    """The arguments of a layer's convolution besides the kernel: stride, padding, dilation, groups."""

    kind: str
    stride: tuple[int, ...] = ()
    padding: str | tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    explicit: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Form:
        kind = kind_of(layer)
        assert kind is not None
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            return cls(kind)
        sides = tuple(explicit_padding(layer))
        return cls(kind, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode, sides)

    @property
    def is_convolution(self) -> bool:
        return self.kind in AXES

    def along(self, covered: str, values: Sequence[int], neutral: int) -> tuple[int, ...]:
        """The layer's values on the covered axes, and `neutral` on the other axes."""
        return tuple(v if axis in covered else neutral for axis, v in zip(AXES[self.kind], values, strict=True))

    def padding_along(self, covered: str) -> str | tuple[int, ...]:
        if isinstance(self.padding, str):
            return self.padding if covered else (0,) * len(AXES[self.kind])
        return self.along(covered, self.padding, 0)

    def sides_along(self, covered: str) -> list[int]:
        """Padding of the covered axes as F.pad takes it: left, right, top, bottom; 0 on the other axes."""
        pairs = zip(reversed(AXES[self.kind]), self.explicit[::2], self.explicit[1::2], strict=True)
        return [side if axis in covered else 0 for axis, *both in pairs for side in both]

    def ready(self, kernel: Tensor) -> Tensor:
        """A kernel with four (or two) axes in the form that `run` takes."""
        if not self.is_convolution:
            return kernel.flatten(1)
        kernel = kernel.squeeze(2) if self.kind == "conv1d" else kernel
        # An axis of length one may have any stride; with some strides PyTorch assumes channels last for the output.
        return kernel.flatten().view(kernel.shape)

    def module(self, stage: Stage, bias: bool, **like: Any) -> nn.Conv1d | nn.Conv2d | nn.Linear:
        """The ordinary layer that computes the same as `run`, with arbitrary weights; `like`: device and dtype."""
        if not self.is_convolution:
            return nn.Linear(stage.channels, stage.shape[0], bias=bias, **like)
        kind: Any = nn.Conv1d if self.kind == "conv1d" else nn.Conv2d
        return kind(
            stage.channels,
            stage.shape[0],
            stage.shape[3:] if self.kind == "conv1d" else stage.shape[2:],
            stride=self.along(stage.covered, self.stride, 1),
            padding=self.padding_along(stage.covered),
            dilation=self.along(stage.covered, self.dilation, 1),
            groups=stage.groups,
            bias=bias,
            padding_mode=self.padding_mode if stage.covered else "zeros",
            **like,
        )

    def run(self, stage: Stage, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Runs one convolution of a path. It strides, pads and dilates only along its own axes.

        This is exact for every padding mode. Only the last stage has a bias, so padding of one axis commutes with a
        map of the channels, and with a convolution along the other axis.
        """
        if not self.is_convolution:
            return F.linear(x, kernel, bias)
        padding = self.padding_along(stage.covered)
        if self.padding_mode != "zeros" and any(sides := self.sides_along(stage.covered)):
            x, padding = F.pad(x, sides, mode=self.padding_mode), 0
        convolve = F.conv1d if self.kind == "conv1d" else F.conv2d
        stride, dilation = self.along(stage.covered, self.stride, 1), self.along(stage.covered, self.dilation, 1)
        return convolve(x, kernel, bias, stride, padding, dilation, stage.groups)  # type: ignore[arg-type]


def explicit_padding(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Padding as F.pad takes it: left, right, top, bottom."""
    sides: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            amount = 0 if isinstance(layer.padding, str) else layer.padding[axis]
            sides += [amount, amount]
    return sides
