"""The layers, norms and weights of random networks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


class ChannelsLast(nn.Module):
    """A module that wants channels last, within maps that have them second."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class Turned(nn.Module):
    """A module that wants channels second, within rows that have them last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2).contiguous()


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x, need_weights=False)[0].contiguous()


class Recurrent(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.cells = nn.GRU(channels, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0].contiguous()


class Experts(nn.Module):
    """Two layers, of which each example goes to one."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(channels, width), nn.Linear(channels, width)])

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.experts[0].out_features)  # type: ignore[arg-type]
        for number, expert in enumerate(self.experts):
            chosen = (x[..., 0] > 0.1) == bool(number)
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return y


class OwnConv2d(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class _Active:
    """A batch norm that has its activation inside, like timm's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), 0.1)  # type: ignore[misc]


class ActiveBatchNorm1d(_Active, nn.BatchNorm1d): ...


class ActiveBatchNorm2d(_Active, nn.BatchNorm2d): ...


class Bent(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight)


def _in_the_old_way(norm: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return apply


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.3)


def layer_of(kind: str, form: str, shape: Sequence[int], width: int, kernel: int, bias: bool) -> nn.Module:
    """A layer for one example of a shape; what does not fit the shape is taken smaller."""
    if form in ("rows", "vectors"):
        return _dense_layer(kind, shape[-1], width, bias)
    if form == "volumes" and kind == "volume":
        return nn.Conv3d(shape[0], width, min(kernel, *shape[1:]), bias=bias)
    flat = form == "series"
    conv: Any = nn.Conv1d if flat else nn.Conv2d
    channels, smallest = shape[0], min(shape[1:])
    kernel = min(kernel, smallest)
    odd = kernel - 1 + kernel % 2  # PyTorch warns of kernels of other sizes that are padded to the same size
    groups = math.gcd(channels, width)
    same: dict[str, Any] = {"padding": "same", "bias": bias}
    if kind == "channels last":
        return ChannelsLast(nn.Linear(channels, width, bias))
    if kind == "transposed":
        return (nn.ConvTranspose1d if flat else nn.ConvTranspose2d)(channels, width, kernel, stride=2, bias=bias)
    made: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: conv(channels, width, odd, **same),
        "pointwise": lambda: conv(channels, width, 1, bias=bias),
        "unpadded": lambda: conv(channels, width, kernel, bias=bias),
        "strided": lambda: conv(channels, width, kernel, stride=2, padding=kernel // 2, bias=bias),
        "dilated": lambda: conv(channels, width, odd, dilation=2, **same),
        "grouped": lambda: conv(channels, width, odd, groups=groups, **same),
        "depthwise": lambda: conv(channels, 2 * channels, odd, groups=channels, **same),
        "oblong": lambda: conv(channels, width, (odd, 1), **same),
        "reflecting": lambda: conv(channels, width, odd, padding_mode="reflect" if smallest > 4 else "zeros", **same),
        "circular": lambda: conv(channels, width, odd, padding_mode="circular" if smallest > 4 else "zeros", **same),
        "own convolution": lambda: OwnConv2d(channels, width, odd, **same),
    }
    return made[kind]()


def _dense_layer(kind: str, channels: int, width: int, bias: bool) -> nn.Module:
    if kind == "matrix":
        from transformers.pytorch_utils import Conv1D

        return Conv1D(width, channels)
    made: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(channels, width, bias),
        "attention": lambda: Attention(channels),
        "recurrent": lambda: Recurrent(channels, width),
        "encoder": lambda: nn.TransformerEncoderLayer(channels, 2 - channels % 2, width, 0.0, batch_first=True),
        "experts": lambda: Experts(channels, width),
        "own linear": lambda: OwnLinear(channels, width, bias),
    }
    return made[kind]()


def norm_of(kind: str, form: str, shape: Sequence[int]) -> nn.Module:
    """A norm for one example of a shape."""
    channels = shape[-1] if form == "rows" else shape[0]
    positions = math.prod(shape) // channels
    alone = {
        "batch of the moment": positions,
        "instance": positions,
        "group": math.prod(shape) // math.gcd(channels, 2),
    }
    if alone.get(kind) == 1:
        return nn.Identity()  # one number has no variance
    batch: Any = {"maps": nn.BatchNorm2d, "volumes": nn.BatchNorm3d}.get(form, nn.BatchNorm1d)
    made: dict[str, Callable[[], nn.Module]] = {
        "no norm": nn.Identity,
        "batch": lambda: batch(channels),
        "batch without affine": lambda: batch(channels, affine=False),
        "batch of the moment": lambda: batch(channels, track_running_stats=False),
        "active batch": lambda: (ActiveBatchNorm2d if form == "maps" else ActiveBatchNorm1d)(channels),
        "batch of positions": lambda: nn.BatchNorm1d(shape[0]),
        "batch of channels": lambda: Turned(nn.BatchNorm1d(channels)),
        "group": lambda: nn.GroupNorm(math.gcd(channels, 2), channels),
        "instance": lambda: (nn.InstanceNorm2d if form == "maps" else nn.InstanceNorm1d)(channels),
        "layer": lambda: nn.LayerNorm(channels),
    }
    return made[kind]()


@torch.no_grad()
def shape_after(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that one example has after a module."""
    training = module.training
    answer = module.eval()(torch.zeros(2, *shape))
    module.train(training)
    return tuple(answer.shape[1:])


@torch.no_grad()
def spread_(model: nn.Module) -> None:
    """Gives norms statistics and weights that matter, as training would."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.3, 2)  # type: ignore[union-attr]
            if module.affine:
                module.weight.uniform_(0.5, 2)
                module.bias.normal_(std=0.3)


WEIGHTS: dict[str, Callable[[Any], nn.Module]] = {
    "as it is": lambda layer: layer,
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "old weight norm": _in_the_old_way(nn.utils.weight_norm),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "old spectral norm": _in_the_old_way(nn.utils.spectral_norm),
    "parametrized": lambda layer: (parametrize.register_parametrization(layer, "weight", Bent()), layer)[1],
    "pruned": pruned,
    "pruned for good": lambda layer: prune.remove(pruned(layer), "weight"),
}
"""What is done to a layer's weight."""
