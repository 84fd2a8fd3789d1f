"""The layers that can be tensorized, and their kernels.

A kernel has four axes, (T, S of one group, H, W), or two for a dense layer, (T, S). Any convolution has such a kernel:

- in a 1-d convolution H is 1. In a 3-d convolution H stands for depth and height, one after the other;
- a transposed convolution is an ordinary one over its input with zeros in between, with the taps in reverse order. Its
  kernel is the one of this ordinary convolution, but keeps the order of the taps, so that it is a view of the weight.

A table of embeddings (`nn.Embedding`) counts as a kernel with a row for each token. It can have a low rank and few
bits, and no other decomposition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tspc.decompositions import Shape
from tspc.errors import DecompositionError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
DenseLayer = Convolution | nn.Linear
"""Also transformers' `Conv1D`, a dense layer with its matrix transposed, told by its name and its attributes."""

EMBEDDING = "embedding"
"""The kind of a table: its rows are looked up, and no inputs are multiplied with it."""
_SPATIAL = {"1d": "w", "2d": "hw", "3d": "hhw"}
AXES = {f"{kind}{size}": axes for kind in ("conv", "conv_transpose") for size, axes in _SPATIAL.items()}
"""For each kind of convolution the kernel's axis of each of its spatial axes; depth and height are one axis there."""
TRANSPOSED = tuple(kind for kind in AXES if kind.startswith("conv_transpose"))
_KINDS = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: EMBEDDING,
}


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "transposed" (linear), "embedding" or a key of `AXES`; None for other modules and subclasses."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module.weight, "ndim", 0) == 2:
        return "transposed"
    return _KINDS.get(type(module))  # type: ignore[call-overload]


def is_table(module: nn.Module) -> bool:
    """Whether a module is a table of embeddings."""
    return kind_of(module) == EMBEDDING


def has_inputs(module: nn.Module) -> bool:
    """Whether a module is a convolution or a dense layer of a known kind, which multiplies its inputs by a kernel."""
    return kind_of(module) not in (None, EMBEDDING)


def output_count(layer: nn.Module) -> int:
    """The number of entries of an output row: the output channels, or the length of an embedding."""
    return kernel_shape(layer)[-1 if is_table(layer) else 0]


def as_kernel(weight: Tensor, kind: str | None, groups: int = 1) -> Tensor:
    """A layer's weight as a kernel: (T, S) for a dense layer, (T, S of one group, H, W) for a convolution.

    A table is (tokens, length of an embedding). The kernel is a view of the weight, but for a transposed convolution
    with groups.
    """
    if kind == "transposed":
        return weight.T
    if kind not in AXES:
        return weight
    weight = _turned(weight, groups) if kind in TRANSPOSED else weight
    axes = AXES[kind]
    return weight.unsqueeze(2) if len(axes) == 1 else weight.flatten(2, 3) if len(axes) == 3 else weight


def as_weight(kernel: Tensor, kind: str | None, groups: int = 1, window: Shape = ()) -> Tensor:
    """The inverse of `as_kernel`. `window` is the layer's `kernel_size`; only a 3-d convolution needs it."""
    if kind == "transposed":
        return kernel.T
    if kind not in AXES:
        return kernel
    axes = AXES[kind]
    kernel = kernel.squeeze(2) if len(axes) == 1 else kernel.unflatten(2, window[:2]) if len(axes) == 3 else kernel
    return _turned(kernel, groups) if kind in TRANSPOSED else kernel


def _turned(weight: Tensor, groups: int) -> Tensor:
    """The weight (S, T of one group, …) of a transposed convolution as (T, S of one group, …), and back."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def kernel_of(layer: nn.Module) -> Tensor:
    """The kernel of a dense layer, or the rebuilt kernel of a tensorized layer."""
    return as_kernel(layer.weight, *_form(layer)[:2])  # type: ignore[arg-type]


@torch.no_grad()
def set_kernel_(layer: nn.Module, kernel: Tensor) -> None:
    """Gives a dense layer another kernel, (T, S of one group, H, W) or (T, S)."""
    layer.weight.copy_(as_weight(kernel, *_form(layer)))  # type: ignore[operator, union-attr]


def _form(layer: nn.Module) -> tuple[str | None, int, Shape]:
    """The kind, the groups and the window of a dense or tensorized layer."""
    kind = getattr(layer, "kind", None) or kind_of(layer)
    return (kind, layer.groups, layer.kernel_size) if kind in AXES else (kind, 1, ())  # type: ignore[return-value]


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
