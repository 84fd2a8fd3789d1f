"""Other low-rank decompositions of a network's dense layers, at the same parameters: every layer has the same rate.

- `svd`: the truncated SVD of each kernel;
- `asvd`: inputs scaled by the root of their mean absolute value before the SVD (Yuan et al., ASVD, arXiv:2312.05821);
- `whitening`: truncation-aware data whitening by a Cholesky factor of the inputs' second moments (Wang et al., SVD-LLM,
  arXiv:2403.07378).

These are the decompositions of the papers, with the rank that the rate gives each layer. ASVD's search for the layers'
ranks and SVD-LLM's training afterwards are left out. Positions that hold no token do not count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

ALPHA = 0.5
"""ASVD's exponent of the inputs' sizes; its authors' choice."""
FLOOR = 1e-6
"""Added to the second moments, as a share of their mean, until a Cholesky factor exists; then ten times as much."""

METHODS = ("svd", "asvd", "whitening")


class Inputs:
    """What each dense layer sees: Σxxᵀ (n × n), Σ|x| (n) and the number of rows, over all batches."""

    def __init__(
        self, model: nn.Module, layers: Collection[str], batches: Iterable[Any], call: Callable[[Any], Tensor | None]
    ) -> None:
        """`call` runs the network on a batch; it returns which positions hold something (N, L), or None: all."""
        self.squares: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        seen: list[tuple[str, Tensor]] = []

        def note(name: str) -> Callable[..., None]:
            return lambda module, given, output: seen.append((name, given[0].detach()))

        hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in layers]
        with torch.no_grad():
            for batch in batches:
                mask = call(batch)
                for name, x in seen:
                    self._add(name, x, mask)
                seen.clear()
        for hook in hooks:
            hook.remove()

    def _add(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        rows = x[mask] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2)
        if name not in self.squares:
            n = rows.shape[1]
            self.squares[name], self.sizes[name], self.counts[name] = torch.zeros(n, n), torch.zeros(n), 0
        self.squares[name] += rows.T @ rows
        self.sizes[name] += rows.abs().sum(0)
        self.counts[name] += len(rows)


def rank_of(weight: Tensor, rate: float) -> int:
    """The largest rank with at most `rate` of the kernel's parameters (T × n)."""
    return max(1, int(rate * weight.numel() / sum(weight.shape)))


@torch.no_grad()
def decomposed(model: nn.Module, layers: Collection[str], rate: float, method: str, inputs: Inputs) -> nn.Module:
    """A copy of the network with the product of two factors as the kernel of each layer.

    A layer with rank R for T × n entries counts R(T + n) parameters. Products make the same answer as two layers.
    """
    small = copy.deepcopy(model)
    for name in layers:
        weight = cast(Tensor, small.get_submodule(name).weight)
        root, inverse = _roots(weight, method, name, inputs)
        u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
        rank = rank_of(weight, rate)
        weight.copy_(((u[:, :rank] * s[:rank]) @ v[:rank]) @ inverse)
    return small


def _roots(weight: Tensor, method: str, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The matrix that multiplies a kernel before the SVD, and its inverse."""
    n = weight.shape[1]
    eye = torch.eye(n, dtype=torch.float64)
    if method == "svd":
        return eye, eye
    if method == "asvd":
        scale = (inputs.sizes[name].double() / inputs.counts[name]).clamp_min(1e-6) ** ALPHA
        return scale.diag(), (1 / scale).diag()
    moments = inputs.squares[name].double() / inputs.counts[name]
    floor = FLOOR
    while True:
        root, failed = torch.linalg.cholesky_ex(moments + floor * moments.diagonal().mean() * eye)
        if not int(failed):
            return root, torch.linalg.solve_triangular(root, eye, upper=False)
        floor *= 10
