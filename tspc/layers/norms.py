"""Batch norms that a layer before them can take over, or at least shift: told by their class, and tried."""

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
    """Whether a module is nothing but an affine map of its channels."""
    return type(norm) in EXACT and is_untouched(norm)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's own `forward` and nothing else."""
    return "forward" not in vars(module) and not any(vars(module).get(hooks) for hooks in CALL_HOOKS)


def has_statistics(norm: nn.Module) -> bool:
    """Whether a batch norm goes by running statistics."""
    return isinstance(norm, BatchNorm) and not norm.training and norm.running_mean is not None


def along_channels(layer: nn.Module, norm: nn.Module, output: Tensor) -> bool:
    """Whether what `norm` takes for channels are the outputs of `layer`, which answered `output`.

    A batch norm's channels are the second axis; a dense layer's outputs are the last one, and a convolution's the
    second one, unless it was given an image without a batch.
    """
    ndim = 2 + len(AXES.get(getattr(layer, "kind", None) or kind_of(layer) or "", ""))
    return output.ndim == ndim and cast(BatchNorm, norm).num_features == len(kernel_of(layer))


@torch.no_grad()
def takes_shift(norm: nn.Module, output: Tensor) -> bool:
    """Whether a constant added to each channel of `output` and to the norm's running mean leaves its answer as it is.

    That is so for a plain batch norm, and tried for its subclasses.
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
