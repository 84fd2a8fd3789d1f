"""Finds batch norms that can be folded into the layer before them, or that can at least undo a shift of its output."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tspc.layers.dense import AXES, kernel_of, kind_of
from tspc.layers.replacing import CALL_HOOKS

BatchNorm = nn.modules.batchnorm._BatchNorm
EXACT = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Classes that normalise and do nothing else; a subclass may do anything besides."""


def is_exact(norm: nn.Module) -> bool:
    """Whether a module is only an affine map of its channels."""
    return type(norm) in EXACT and is_untouched(norm)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs only the `forward` of its class: no hooks, no replaced methods."""
    return "forward" not in vars(module) and not any(vars(module).get(hooks) for hooks in CALL_HOOKS)


def has_statistics(norm: nn.Module) -> bool:
    """Whether a batch norm uses running statistics in eval mode."""
    return isinstance(norm, BatchNorm) and not norm.training and norm.running_mean is not None


def along_channels(layer: nn.Module, norm: nn.Module, output: Tensor) -> bool:
    """Whether the channels of `norm` are the outputs of `layer`; `output` is what the layer returned.

    A batch norm's channels are the second axis. A dense layer's outputs are the last axis. A convolution's outputs are
    the second axis, except for an image without a batch.
    """
    ndim = 2 + len(AXES.get(getattr(layer, "kind", None) or kind_of(layer) or "", ""))
    return output.ndim == ndim and cast(BatchNorm, norm).num_features == len(kernel_of(layer))


@torch.no_grad()
def takes_shift(norm: nn.Module, output: Tensor) -> bool:
    """Whether the norm's running mean can undo a constant that is added to each channel of `output`.

    This holds for a plain batch norm. Its subclasses are tried.
    """
    if is_exact(norm):
        return True
    mean = cast(Tensor, norm.running_mean)
    before, given = mean.clone(), output.detach().clone()
    shift = torch.linspace(-1.0, 1.0, len(mean)).to(mean) * cast(Tensor, norm.running_var).sqrt()
    try:
        wanted = norm(given.clone())
        mean += shift
        answer = norm(given + shift.reshape(-1, *[1] * (output.ndim - 2)).to(given))
    except Exception:  # a subclass may be anybody's
        return False
    finally:
        mean.copy_(before)
    if not (isinstance(wanted, Tensor) and isinstance(answer, Tensor) and wanted.is_floating_point()):
        return False
    difference, largest = (wanted - answer).abs().max(), wanted.abs().max()
    return bool(difference <= max(1e-3, 8 * torch.finfo(wanted.dtype).eps) * largest)
