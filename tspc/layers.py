"""Factors → modules: a tensorized layer acts exactly like the dense layer with the rebuilt kernel.

Two forms, chosen by the method:

- `Chain`: ordinary convolutions (or dense layers) one after the other, whose weights are the factors;
- `RebuiltConv2d`, `RebuiltLinear`: the kernel is contracted from the factors at each call. The reshaped
  methods take this form: run literally, their contraction costs more than the dense layer.

Both show `weight` (rebuilt, differentiable) and `bias` like the layer they replace, so that code which
reads a layer's weight directly keeps working.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspc.decompositions import Decomposition, Factors, Metric, Rank, Shape

DenseLayer = nn.Conv2d | nn.Linear


class TensorizedLayer(nn.Module):
    """What all tensorized layers share: the decomposition, the dense kernel's shape, the rank."""

    decomposition: Decomposition
    shape: Shape
    rank: Rank

    def factor_tensors(self) -> list[Tensor]:
        """The factors, in the order of the decomposition: the parameters, or views of them."""
        raise NotImplementedError

    def factors(self) -> Factors:
        return Factors(tuple(self.factor_tensors()), self.shape, self.rank)

    @property
    def weight(self) -> Tensor:
        """The dense kernel that the factors stand for; differentiable."""
        return self.decomposition.reconstruct(self.factors())

    def extra_repr(self) -> str:
        return f"{self.decomposition.name}, shape={self.shape}, rank={self.rank}"


class Chain(TensorizedLayer, nn.Sequential):
    """Convolutions (or dense layers) in sequence; the last one carries the bias."""

    def __init__(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank) -> None:
        shape = tuple(layer.weight.shape)
        build = _chain_conv if isinstance(layer, nn.Conv2d) else _chain_linear
        nn.Sequential.__init__(self, *build(layer, decomposition, shape, rank))  # type: ignore[arg-type]
        self.decomposition, self.shape, self.rank = decomposition, shape, rank

    def factor_tensors(self) -> list[Tensor]:
        return [cast(Tensor, link.weight) for link in self]

    @property
    def bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self[-1].bias)


def _chain_linear(layer: nn.Linear, decomposition: Decomposition, shape: Shape, rank: Rank) -> list[nn.Module]:
    shapes = decomposition.factor_shapes(shape, rank)
    last = len(shapes) - 1
    return [
        nn.Linear(n_in, n_out, bias=layer.bias is not None and i == last, **_like(layer))
        for i, (n_out, n_in) in enumerate(shapes)
    ]


def _chain_conv(layer: nn.Conv2d, decomposition: Decomposition, shape: Shape, rank: Rank) -> list[nn.Module]:
    """Each link strides, pads and dilates along the axes that its kernel covers and no other.

    That is exact for every padding mode: padding one axis commutes with a map of the channels and with a
    convolution along the other axis, because no link but the last has a bias.
    """
    shapes = decomposition.factor_shapes(shape, rank)
    axes = decomposition.chain_axes(shape)
    assert axes is not None
    links: list[nn.Module] = []
    channels = shape[1]
    for i, ((n_out, n_in, h, w), covered) in enumerate(zip(shapes, axes, strict=True)):
        link = nn.Conv2d(
            channels,
            n_out,
            (h, w),
            stride=_along(covered, layer.stride, 1),
            padding=_link_padding(layer, covered),
            dilation=_along(covered, layer.dilation, 1),
            groups=channels // n_in,
            bias=layer.bias is not None and i == len(shapes) - 1,
            padding_mode=layer.padding_mode if covered else "zeros",
            **_like(layer),
        )
        links.append(link)
        channels = n_out
    return links


def _along(covered: str, values: tuple[int, ...], neutral: int) -> tuple[int, int]:
    """The layer's (vertical, horizontal) values on the axes that are covered, the neutral one elsewhere."""
    vertical, horizontal = values
    return vertical if "h" in covered else neutral, horizontal if "w" in covered else neutral


def _link_padding(layer: nn.Conv2d, covered: str) -> str | tuple[int, int]:
    if isinstance(layer.padding, str):
        return layer.padding if covered else (0, 0)
    return _along(covered, layer.padding, 0)


class _Rebuilt(TensorizedLayer):
    bias: nn.Parameter | None

    def __init__(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank) -> None:
        super().__init__()
        self.shape = tuple(layer.weight.shape)
        self.decomposition, self.rank = decomposition, rank
        self._factor_shapes = decomposition.factor_shapes(self.shape, rank)
        # Stored as matrices: `model.to(memory_format=torch.channels_last)` takes any 4- or 5-way parameter for images.
        matrices = [(math.prod(s[:-1]), s[-1]) for s in self._factor_shapes]
        self.factor_list = nn.ParameterList(torch.empty(m, **_like(layer)) for m in matrices)
        bias = layer.bias is not None
        self.register_parameter("bias", nn.Parameter(torch.empty(self.shape[0], **_like(layer))) if bias else None)

    def factor_tensors(self) -> list[Tensor]:
        return [matrix.view(s) for matrix, s in zip(self.factor_list, self._factor_shapes, strict=True)]


class RebuiltLinear(_Rebuilt):
    """A dense layer whose matrix is contracted from its factors at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RebuiltConv2d(_Rebuilt):
    """A convolution whose kernel is contracted from its factors at each call."""

    def __init__(self, layer: nn.Conv2d, decomposition: Decomposition, rank: Rank) -> None:
        super().__init__(layer, decomposition, rank)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.padding_mode = layer.padding_mode
        self.explicit_padding = explicit_padding(layer)

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.explicit_padding, mode=self.padding_mode), 0
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation)  # type: ignore[arg-type]


def explicit_padding(layer: nn.Conv2d) -> list[int]:
    """Padding as F.pad wants it: left, right, top, bottom."""
    sides: list[int] = []
    for axis in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            amount = 0 if isinstance(layer.padding, str) else layer.padding[axis]
            sides += [amount, amount]
    return sides


def _like(layer: DenseLayer) -> dict:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def untrained(layer: DenseLayer, decomposition: Decomposition, rank: Rank) -> TensorizedLayer:
    """The tensorized form of `layer` with factors of the right shapes and arbitrary values."""
    decomposition = decomposition.for_shape(tuple(layer.weight.shape))
    if decomposition.chain_axes(tuple(layer.weight.shape)) is not None:
        return Chain(layer, decomposition, rank)
    form = RebuiltConv2d if isinstance(layer, nn.Conv2d) else RebuiltLinear
    return form(layer, decomposition, rank)  # type: ignore[arg-type]


def tensorize(
    layer: DenseLayer,
    decomposition: Decomposition,
    rank: Rank,
    *,
    kernel: Tensor | None = None,
    metric: Metric | None = None,
) -> TensorizedLayer:
    """Decomposes `layer.weight` and returns the layer that runs on the factors, in the same mode.

    Stride, padding (every mode), dilation and bias are kept. `kernel` (of the weight's shape) is decomposed in the
    weight's stead, where given, and `metric` is the norm to fit it in. Raises DecompositionError as `decompose` does.
    """
    decomposition = decomposition.for_shape(tuple(layer.weight.shape))
    factors = decomposition.decompose(layer.weight if kernel is None else kernel, rank, metric)
    result = untrained(layer, decomposition, rank)
    with torch.no_grad():
        for own, value in zip(result.factor_tensors(), factors.tensors, strict=True):
            own.copy_(value)
        if layer.bias is not None:
            cast(nn.Parameter, result.bias).copy_(layer.bias)
    for parameter in result.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    return result.train(layer.training)


def tensorized_layers(model: nn.Module) -> dict[str, TensorizedLayer]:
    """All tensorized layers of a network by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TensorizedLayer)}
