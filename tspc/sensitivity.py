"""How much the network's answer depends on the outputs of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.dense import DenseLayer
from tspc.hooks import hooked
from tspc.moments import rows_of

IMAGES = 128
"""Images of which the gradients are taken, in batches of `BATCH`: they need the memory of training."""
BATCH = 4
PROBES = 2
SHRINKAGE = 1e-2
"""Least share of the mean added to all outputs alike."""


def output_sensitivity(model: nn.Module, layers: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """For each layer Σ E[ggᵀ] over its output positions (T × T), g the gradient of a random projection of the answer.

    An error e of the layer's outputs then changes the answer by about eᵀGe, squared (the output factor of K-FAC,
    Martens & Grosse, ICML 2015, with Gaussian projections of the logits in place of sampled labels). Where few
    gradients stand against many outputs the matrix is shrunk towards a multiple of the identity.

    Empty if the network does not answer with one tensor, or takes no floating-point input; a layer on which
    the answer does not depend is left out.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def on_gradient(name: str, layer: DenseLayer) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            g = rows_of(layer, gradient).detach().float()
            sums[name] = sums.get(name, torch.zeros(())).to(g) + g.T @ g
            rows[name] = rows.get(name, 0) + len(g)

        return add

    def on_output(name: str) -> Callable[..., None]:
        # A hook of the tensor's own: a later operation may change the output in place.
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(on_gradient(name, cast(DenseLayer, module)))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(on_output(name)) for name in layers]
    with hooked(handles):
        images = _backward(model, batches)
    # In float32, for all layers' matrices are kept at once; they are widened when their layer's turn comes.
    found = {name: total / (images * PROBES) for name, total in sums.items()}
    seen = {name: total for name, total in found.items() if 0 < float(total.trace()) < math.inf}
    return {name: _shrunk(total, rows[name]) for name, total in seen.items()}


def _backward(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Sends random projections of the answers back; returns the number of images."""
    generator = torch.Generator().manual_seed(0)
    images = 0
    for batch in batches:
        if not batch.is_floating_point():
            return images
        for part in batch.split(BATCH):
            with torch.enable_grad():
                inputs = part.detach().clone().requires_grad_()
                answer = model(inputs)
                if not isinstance(answer, Tensor) or not answer.requires_grad:
                    return images
                for probe in range(PROBES):
                    direction = torch.randn(answer.shape, generator=generator).to(answer)
                    if answer.ndim == 2 and answer.shape[1] > 1:
                        # A constant added to all logits changes no probability.
                        direction -= direction.mean(1, keepdim=True)
                    torch.autograd.grad((answer * direction).sum(), inputs, retain_graph=probe + 1 < PROBES)
            images += len(part)
        if images >= IMAGES:
            break
    return images


def _shrunk(matrix: Tensor, rows: int) -> Tensor:
    share = max(SHRINKAGE, min(1.0, len(matrix) / rows))
    mean = matrix.diagonal().mean()
    return (1 - share) * matrix + share * mean * torch.eye(len(matrix)).to(matrix)
