"""Solves a dense layer anew, for its present inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tspc.calibration.gathering import is_narrow
from tspc.calibration.moments import Moments
from tspc.calibration.patches import Positions, input_patches, output_rows
from tspc.calibration.samples import Calibration
from tspc.layers.dense import DenseLayer, has_inputs, kernel_of, kernel_shape, set_kernel_
from tspc.system import processes
from tspc.system.modes import own_modes
from tspc.traversal.tracing import Trace


def adapted_layers(model: nn.Module, reference: nn.Module) -> list[str]:
    """The dense layers that differ from the reference's, because they correct the errors of the layers before them."""
    ours = dict(model.named_modules())
    dense = [(name, layer) for name, layer in reference.named_modules() if has_inputs(layer)]
    return [name for name, layer in dense if has_inputs(ours[name]) and not _are_equal(ours[name], layer)]


def _are_equal(layer: nn.Module, other: nn.Module) -> bool:
    pairs = zip(layer.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def can_be_refitted(model: nn.Module, name: str, found: Trace) -> bool:
    """Whether a layer is called once, and holds the shift of its output itself.

    If a layer has a batch norm behind it but no bias, phase 0 puts the shift into the batch norm.
    """
    return found.calls[name] == 1 and (name not in found.batch_norms or model.get_submodule(name).bias is not None)


@own_modes()
@torch.no_grad()
def refit_(
    layer: nn.Module, original: nn.Module, pairs: Iterable[tuple[Tensor, Tensor, Sequence[Tensor]]], batches: int
) -> None:
    """Gives the layer the kernel and the bias with the least mean squared error of its outputs.

    `pairs` gives (x, y, masks) for each of the `batches`: the layer's input, the output of the `original` layer in the
    reference, and which positions hold something. A small damping pulls the kernel towards the original's, as in
    `apply_`. A layer with too many inputs for their second moments is not changed.
    """
    if not is_narrow(layer):
        return
    dense, own = cast(DenseLayer, layer), cast(DenseLayer, original)
    settings, moments, images = Calibration(), None, 0
    most = max(1, settings.patches // (batches * processes.count()))
    for number, (x, y, masks) in enumerate(pairs):
        positions = Positions.at_most(most, dense, y.shape, number, masks)
        rows = input_patches(dense, x.float(), positions)
        moments = moments or Moments(rows.shape[-1], kernel_shape(dense)[0], rows.device, len(rows))
        moments.add(rows, output_rows(own, y.float(), positions))
        images += len(x)
    if moments is None:
        return
    moments.join()
    images = int(processes.summed(torch.tensor(images, device=moments.device)))
    found = moments.statistics(kernel_of(own), dense.bias is not None, settings.damping, images=images)
    set_kernel_(dense, found.target.reshape(kernel_shape(dense)))
    shift = found.shift(kernel_of(dense))
    if dense.bias is not None and own.bias is not None and shift is not None:
        dense.bias.copy_(own.bias + shift.to(own.bias))
