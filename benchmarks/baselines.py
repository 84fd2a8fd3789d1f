"""Other low-rank decompositions of a network's dense layers, at the same parameters: every layer has the same rate.

- `svd`: the truncated SVD of each kernel;
- `asvd`: inputs scaled by the root of their mean absolute value before the SVD (Yuan et al., ASVD, arXiv:2312.05821);
- `whitening`: truncation-aware data whitening by a Cholesky factor of the inputs' second moments (Wang et al., SVD-LLM,
  arXiv:2403.07378).

These are the decompositions of the papers, with the rank that the rate gives each layer. ASVD's search for the layers'
ranks and SVD-LLM's training afterwards are left out. Positions that hold no token do not count.

`of_bytes` gives the same decompositions in few bits, at a share of the network's bytes: factors and tables of
embeddings are rounded to the nearest of equal steps, and what lies beside them is in half precision. The first factor
has a scale for each column, the second one for each row. There is no error feedback, as in GPTQ (arXiv:2210.17323).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

ALPHA = 0.5
"""ASVD's exponent of the inputs' sizes; its authors' choice."""
FLOOR = 1e-6
"""Added to the second moments, as a share of their mean, until a Cholesky factor exists; then ten times as much."""

METHODS = ("svd", "asvd", "whitening")

BITS = (8, 6, 5, 4, 3)
"""Bits of layers or factors, and of tables, that are tried."""
CLIPS = torch.linspace(0.5, 1.0, 16).tolist()
"""Shares of a row's largest entry that are tried as the largest value; the least squared error decides."""
LEAST_RATE = 0.1
"""With less left for the layers, no network is made."""
SCALE = 16
"""Bits of the size of a row's or column's steps, and of each number beside layers and tables."""


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

    def take(self, other: Inputs) -> None:
        """Adds what other layers see."""
        self.squares |= other.squares
        self.sizes |= other.sizes
        self.counts |= other.counts

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
def decomposed(
    model: nn.Module, layers: Collection[str], rate: float, method: str, inputs: Inputs, bits: int | None = None
) -> nn.Module:
    """A copy of the network with the product of two factors as the kernel of each layer.

    A layer with rank R for T × n entries counts R(T + n) parameters. Products make the same answer as two layers. With
    `bits` the factors are rounded; each column of the first and each row of the second has a scale of its own.
    """
    small = copy.deepcopy(model)
    for name in layers:
        weight = cast(Tensor, small.get_submodule(name).weight)
        root, inverse = _roots(weight, method, name, inputs)
        u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
        rank = rank_of(weight, rate)
        first, second = u[:, :rank] * s[:rank], v[:rank] @ inverse
        if bits is not None:
            first, second = _nearest(first.T, bits).T, _nearest(second, bits)
        weight.copy_(first @ second)
    return small


def of_bytes(
    model: nn.Module, layers: Collection[str], share: float, method: str, inputs: Inputs, widths: Sequence[int] = BITS
) -> Iterator[tuple[str, nn.Module]]:
    """Networks of at most `share` of the float32 bytes, each with what it is: its bits, and the rate of its layers.

    For `method` "rounding" the layers are not decomposed, and each row has a scale; only the most bits that fit are
    tried. Otherwise factors and tables have one of the `widths` each, and the layers get the rate that these leave;
    there is no network where that is 1 or more.
    """
    weights = [cast(Tensor, model.get_submodule(name).weight) for name in layers]
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inside, looked_up = (sum(x.numel() for x in some) for some in (weights, [x.weight for x in tables.values()]))
    whole = sum(value.numel() for value in model.parameters())
    fixed = SCALE * (whole - inside - looked_up + sum(len(table.weight) for table in tables.values()))
    widest, widths = 0, BITS if method == "rounding" else widths
    for bits, table_bits in itertools.product(widths, widths):  # from many to few
        left = 32 * share * whole - fixed - table_bits * looked_up
        if method == "rounding":
            if bits * inside + SCALE * sum(map(len, weights)) > left or table_bits <= widest:
                continue
            widest = table_bits
            small, told = copy.deepcopy(model), f"{bits} bits, tables {table_bits}"
            _round_(small, layers, bits)
        else:
            rate = left / inside / (bits + 2 * SCALE / min(sum(weight.shape) for weight in weights))
            if not LEAST_RATE <= rate < 1:
                continue
            small = decomposed(model, layers, rate, method, inputs, bits)
            told = f"rate {rate:.2f} in {bits} bits, tables {table_bits}"
        _round_(small, tables, table_bits)
        yield told, small


@torch.no_grad()
def _round_(model: nn.Module, names: Collection[str], bits: int) -> None:
    for name in names:
        weight = cast(Tensor, model.get_submodule(name).weight)
        weight.copy_(_nearest(weight, bits))


def _nearest(matrix: Tensor, bits: int) -> Tensor:
    """Each row on equal steps around 0, whose size is a number in half precision."""
    most, best, least = 2 ** (bits - 1) - 1, matrix, torch.full((len(matrix), 1), torch.inf, dtype=matrix.dtype)
    for clip in CLIPS:
        step = (clip * matrix.abs().amax(1, keepdim=True) / most).half().clamp_min(1e-7).to(matrix)
        rounded = (matrix / step).round().clamp(-most, most) * step
        error = (rounded - matrix).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best


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
