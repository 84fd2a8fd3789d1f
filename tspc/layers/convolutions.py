"""How a layer runs with another kernel: the same stride, padding, dilation and groups, link by link of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tspc.decompositions import Shape
from tspc.layers.chains import Stage
from tspc.layers.dense import AXES, TRANSPOSED, Convolution, as_kernel, as_weight, kind_of

_MODULES = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_FUNCTIONS = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}


@dataclass(frozen=True)
class Form:
    """The arguments of a layer's convolution besides the kernel: stride, padding, dilation, groups.

    All tuples have an entry for each spatial axis; `explicit` is the padding as F.pad takes it, and `window` the size
    of the kernel. A transposed convolution crops its output by `padding`, and `output_padding` makes it longer.
    """

    kind: str
    stride: tuple[int, ...] = ()
    padding: str | tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    explicit: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Form:
        kind = kind_of(layer)
        assert kind is not None
        if not isinstance(layer, Convolution):
            return cls(kind)
        sides = tuple(explicit_padding(layer))
        given = layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode, sides, layer.kernel_size
        return cls(kind, *given, layer.output_padding)

    @property
    def is_convolution(self) -> bool:
        return self.kind in AXES

    @property
    def axes(self) -> str:
        """The kernel's axis of each spatial axis of the layer; empty for a dense layer."""
        return AXES.get(self.kind, "")

    def kind_of(self, stage: Stage) -> str:
        """The kind of layer that computes a stage. A 1×1 link of a transposed convolution is an ordinary one."""
        if not self.is_convolution:
            return "linear"
        covers = any(axis in stage.covered for axis in self.axes)
        return self.kind if covers else self.kind.replace("_transpose", "")

    def is_transposed(self, stage: Stage) -> bool:
        """Whether a stage is a transposed convolution."""
        return self.kind_of(stage) in TRANSPOSED

    def along(self, covered: str, values: Sequence[int], neutral: int) -> tuple[int, ...]:
        """The layer's values on the covered axes, and `neutral` on the other axes."""
        return tuple(v if axis in covered else neutral for axis, v in zip(self.axes, values, strict=True))

    def window_of(self, stage: Stage) -> tuple[int, ...]:
        """The size of a stage's kernel along each spatial axis."""
        return self.along(stage.covered, self.window, 1)

    def padding_along(self, covered: str) -> str | tuple[int, ...]:
        if isinstance(self.padding, str):
            return self.padding if covered else (0,) * len(self.axes)
        return self.along(covered, self.padding, 0)

    def sides_along(self, covered: str) -> list[int]:
        """Padding of the covered axes as F.pad takes it: left, right, top, bottom; 0 on the other axes."""
        pairs = zip(reversed(self.axes), self.explicit[::2], self.explicit[1::2], strict=True)
        return [side if axis in covered else 0 for axis, *both in pairs for side in both]

    def ready(self, kernel: Tensor, stage: Stage) -> Tensor:
        """A kernel with four (or two) axes as the weight that `run` takes."""
        if not self.is_convolution:
            return kernel.flatten(1)
        weight = as_weight(kernel, self.kind_of(stage), stage.groups, self.window_of(stage))
        # An axis of length one may have any stride; with some strides PyTorch assumes channels last for the output.
        return weight.flatten().view(weight.shape)

    def link_kernel(self, link: nn.Module) -> Tensor:
        """The kernel of a link of a chain, with four axes (or two); a view of its weight, which can be written to."""
        weight: Any = link.weight
        return as_kernel(weight, *self._link(link)) if self.is_convolution else weight

    def link_weight(self, link: nn.Module, kernel: Tensor) -> Tensor:
        """The inverse of `link_kernel`, for another kernel of the same shape."""
        window: Any = getattr(link, "kernel_size", ())
        return as_weight(kernel, *self._link(link), window) if self.is_convolution else kernel

    def _link(self, link: nn.Module) -> tuple[str, int]:
        """The kind and the groups of a link, whose class may be a subclass of an ordinary layer's."""
        is_transposed = isinstance(link, _ConvTransposeNd)
        return (self.kind, link.groups) if is_transposed else (self.kind.replace("_transpose", ""), 1)

    def module(self, stage: Stage, bias: bool, **like: Any) -> nn.Module:
        """The ordinary layer that computes the same as `run`, with arbitrary weights; `like`: device and dtype."""
        kind, outputs = self.kind_of(stage), stage.shape[0]
        made: Any = _MODULES[kind]
        if not self.is_convolution:
            return made(stage.channels, outputs, bias=bias, **like)
        if kind in TRANSPOSED:
            like["output_padding"] = self.along(stage.covered, self.output_padding, 0)
        return made(
            stage.channels,
            outputs,
            self.window_of(stage),
            stride=self.along(stage.covered, self.stride, 1),
            padding=self.padding_along(stage.covered),
            dilation=self.along(stage.covered, self.dilation, 1),
            groups=stage.groups,
            bias=bias,
            padding_mode=self.padding_mode if stage.covered else "zeros",
            **like,
        )

    def run(
        self, stage: Stage, x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int] | None = None
    ) -> Tensor:
        """Runs one convolution of a path. It strides, pads and dilates only along its own axes.

        This is exact for every padding mode. Only the last stage has a bias, so padding of one axis commutes with a
        map of the channels, and with a convolution along the other axis. A transposed convolution crops in the same
        way. `size` is that of its output, if the caller asked for one; see `map_size`.
        """
        kind = self.kind_of(stage)
        if not self.is_convolution:
            return F.linear(x, weight, bias)
        convolve: Any = _FUNCTIONS[kind]
        stride, dilation = self.along(stage.covered, self.stride, 1), self.along(stage.covered, self.dilation, 1)
        padding = self.padding_along(stage.covered)
        if kind in TRANSPOSED:
            longer = self._output_padding(stage, x, size)
            return convolve(x, weight, bias, stride, padding, longer, stage.groups, dilation)
        if self.padding_mode != "zeros" and any(sides := self.sides_along(stage.covered)):
            x, padding = F.pad(x, sides, mode=self.padding_mode), 0
        return convolve(x, weight, bias, stride, padding, dilation, stage.groups)

    def map_size(self, asked: Sequence[int], x: Tensor) -> tuple[int, ...]:
        """The spatial sizes in the `output_size` of a call of a transposed convolution, which may begin with others.

        Raises ValueError, as PyTorch's layers do, for a size that the layer cannot give.
        """
        count = len(self.axes)
        if len(asked) not in (count, x.ndim):
            raise ValueError(f"output_size has {len(asked)} entries; expected {count}, or {x.ndim} with the channels")
        sizes, inputs = tuple(asked[-count:]), x.shape[-count:]
        for i, size in enumerate(sizes):
            least, most = (self.length(i, inputs[i], longer) for longer in (0, self.stride[i] - 1))
            if not least <= size <= most:
                raise ValueError(f"output_size {sizes}: axis {i} of an input of {tuple(inputs)} has {least} to {most}")
        return sizes

    def length(self, axis: int, inputs: int, longer: int | None = None) -> int:
        """The length of a transposed convolution's output along a spatial axis; `longer` is its output padding."""
        longer = self.output_padding[axis] if longer is None else longer
        reach = self.dilation[axis] * (self.window[axis] - 1) + 1
        return (inputs - 1) * self.stride[axis] - 2 * int(self.padding[axis]) + reach + longer

    def _output_padding(self, stage: Stage, x: Tensor, size: Sequence[int] | None) -> tuple[int, ...]:
        longer: Sequence[int] = self.output_padding
        if size is not None:
            inputs = x.shape[-len(self.axes) :]
            longer = [size[i] - self.length(i, inputs[i], 0) for i in range(len(self.axes))]
        return self.along(stage.covered, longer, 0)

    def size_after(self, stage: Stage, size: Sequence[int], x: Tensor) -> Shape:
        """What a link gives when the whole layer is to give maps of this size: the axes that it covers have it."""
        pairs = zip(self.axes, size, x.shape[-len(self.axes) :], strict=True)
        return tuple(wanted if axis in stage.covered else own for axis, wanted, own in pairs)


def explicit_padding(layer: Convolution) -> list[int]:
    """Padding as F.pad takes it: left, right, top, bottom. A transposed convolution crops so much of its output."""
    sides: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            amount = 0 if isinstance(layer.padding, str) else layer.padding[axis]
            sides += [amount, amount]
    return sides
