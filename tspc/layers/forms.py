"""Factors → modules: a tensorized layer computes exactly what the dense layer with the rebuilt kernel computes.

The parameters are the factors, on every path (see `tspc.layers.chains`). The method decides between two forms:

- `Chain`: its children are ordinary convolutions (or dense layers), and their weights are the factors. On the path
  "chain" it is just a sequence of them;
- `Contracted`: the factors are a list of matrices. The kernels of the path are contracted from them. A table of
  embeddings takes the form `Table`, which looks up rows and rounds those rows alone, or `LowRankTable`.

In training kernels are contracted at each call. In eval mode they are contracted once and kept until the factors
change. Both forms have `weight` (rebuilt, differentiable), `bias` and the plain attributes (`in_features`, `stride`, …)
of the layer that they replace, so code that reads them keeps working.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tspc.decompositions import Decomposition, Dense, Factors, Metric, Rank, Shape
from tspc.layers.chains import CHAIN, REBUILT, paths_of, stages_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import TRANSPOSED, DenseLayer, is_table, kernel_of, kernel_shape
from tspc.layers.tensorized import BASIS
from tspc.layers.tensorized import TensorizedLayer as TensorizedLayer
from tspc.quantization.factors import quantized
from tspc.quantization.grids import FULL, Grid


def _is_ordinary(weight: Any) -> bool:
    # torch.export traces with stand-ins of the weights.
    return type(weight) in (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


class Chain(TensorizedLayer, nn.Sequential):
    """Convolutions (or dense layers) in sequence; some may be merged when it runs. The last one holds the bias."""

    def __init__(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str | None = None) -> None:
        nn.Sequential.__init__(self, *_chain_links(layer, decomposition, rank))
        self._prepare(layer, decomposition, rank, path or default_path(layer, decomposition))

    @property
    def runs_factors(self) -> bool:
        if self.bits != FULL:
            return False
        # Tensors of other kinds, such as quantised ones, may support nothing except being a layer's weight.
        return self._path == CHAIN or any(not _is_ordinary(link.weight) for link in self)

    def _run(self, x: Tensor, size: Shape | None = None) -> Tensor:
        if not self.runs_factors:
            return super()._run(x, size)
        if size is None:
            return nn.Sequential.forward(self, x)
        stages = stages_of(self.decomposition, self.shape, self.rank, CHAIN)
        for stage, link in zip(stages, self, strict=True):
            given = (self.form.size_after(stage, size, x),) if self.form.is_transposed(stage) else ()
            x = link(x, *given)
        return x

    def factor_parameters(self) -> list[nn.Parameter]:
        return [cast(nn.Parameter, link.weight) for link in self]

    def factor_tensors(self) -> list[Tensor]:
        return [self.form.link_kernel(link) for link in self]

    def as_parameters(self, factors: Sequence[Tensor]) -> list[Tensor]:
        return [self.form.link_weight(link, factor) for link, factor in zip(self, factors, strict=True)]

    @property
    def bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self[-1].bias)


def _chain_links(layer: DenseLayer, decomposition: Decomposition, rank: Rank) -> list[nn.Module]:
    """Modules whose weights are the factors; see `Form.run` for why they give the layer's output."""
    form, shape = Form.of(layer), kernel_shape(layer)
    stages = stages_of(decomposition, shape, rank, CHAIN)
    last = len(stages) - 1
    has_bias = layer.bias is not None
    return [form.module(stage, has_bias and i == last, **_like(layer)) for i, stage in enumerate(stages)]


class Contracted(TensorizedLayer):
    """A layer that contracts its kernels from its factors; by default to the dense kernel."""

    bias: nn.Parameter | None

    def __init__(self, layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str | None = None) -> None:
        super().__init__()
        shape = kernel_shape(layer)
        self._factor_shapes = decomposition.factor_shapes(shape, rank)
        # Stored as matrices: `model.to(memory_format=torch.channels_last)` treats any 4-d or 5-d parameter as images.
        matrices = [(math.prod(s[:-1]), s[-1]) for s in self._factor_shapes]
        self.factor_list = nn.ParameterList(torch.empty(m, **_like(layer)) for m in matrices)
        if (basis := decomposition.some_basis(shape, rank)) is not None:
            self.register_buffer(BASIS, basis.to(layer.weight.device))
        bias = _bias_of(layer) is not None
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], **_like(layer))) if bias else None)
        self._prepare(layer, decomposition, rank, path or default_path(layer, decomposition))

    def factor_parameters(self) -> list[nn.Parameter]:
        return list(self.factor_list)

    def factor_tensors(self) -> list[Tensor]:
        return [matrix.view(s) for matrix, s in zip(self.factor_list, self._factor_shapes, strict=True)]

    @torch.no_grad()
    def take_(self, decomposition: Decomposition, factors: Factors) -> None:
        """From now on the layer has these factors, of a method with the same ranks and paths, as new parameters."""
        own = self.factor_list[0]
        self.decomposition = decomposition
        self._factor_shapes = decomposition.factor_shapes(self.shape, self.rank)
        matrices = (factor.detach().to(own).flatten(0, -2).contiguous() for factor in factors.tensors)
        self.factor_list = nn.ParameterList(nn.Parameter(matrix, own.requires_grad) for matrix in matrices)
        self._buffers.pop(BASIS, None)
        if factors.basis is not None:
            self.register_buffer(BASIS, factors.basis.to(own.device))
        self.path = self.path


class Table(Contracted):
    """A table of embeddings in few bits. A call rounds the rows that it looks up, never the whole table."""

    padding_idx: int | None

    def _contract(self) -> tuple[Tensor, ...]:
        """The scales of the rows, and no kernel: eval mode would keep it, and it is as large as the table."""
        return tuple(grid.scales for grid in self.grids)

    def _run(self, x: Tensor, size: Shape | None = None) -> Tensor:
        (table,), found = self.factor_tensors(), self.kernels()
        if not found:
            return F.embedding(x, table, self.padding_idx)
        places = x.flatten()
        rows = F.embedding(places, table, self.padding_idx)
        grid = Grid(self.bits, (found[0].expand(len(table)) if len(found[0]) == 1 else found[0])[places])
        rounded = grid.straight_through(rows) if rows.requires_grad else grid.rounded(rows)
        return rounded.reshape(*x.shape, rounded.shape[-1])

    def as_embedding(self) -> nn.Module:
        """An ordinary table with the values that this one looks up."""
        return nn.Embedding.from_pretrained(
            self.weight.detach().clone(),
            freeze=not self.factor_parameters()[0].requires_grad,
            padding_idx=self.padding_idx,
        )


class LowRankTable(Table):
    """A table of embeddings as a product: a call looks up short rows, and a matrix makes them as long as the table's.

    The factors are (rank × length) and (tokens × rank).
    """

    @property
    def runs_factors(self) -> bool:
        return self.bits == FULL

    def _contract(self) -> tuple[Tensor, ...]:
        """The factors, on their grids if they have any."""
        return self.factors().tensors

    def _run(self, x: Tensor, size: Shape | None = None) -> Tensor:
        matrix, rows = self.factor_tensors() if self.runs_factors else self.kernels()
        return F.embedding(x, rows, self.padding_idx) @ matrix

    def as_embedding(self) -> nn.Module:
        """An ordinary table, and a dense layer after it."""
        matrix, rows = (factor.detach().clone() for factor in self.factors().tensors)
        found = nn.Linear(*matrix.shape, bias=False, device="meta")
        found.weight = nn.Parameter(matrix.T.contiguous(), self.factor_parameters()[0].requires_grad)
        freeze = not self.factor_parameters()[1].requires_grad
        return nn.Sequential(nn.Embedding.from_pretrained(rows, freeze=freeze, padding_idx=self.padding_idx), found)


def _bias_of(layer: nn.Module) -> nn.Parameter | None:
    return cast("nn.Parameter | None", getattr(layer, "bias", None))  # a table has none


def _like(layer: DenseLayer) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def is_chain(layer: nn.Module, decomposition: Decomposition) -> bool:
    """Whether the factors themselves are the kernels of a chain of several links."""
    form, shape = Form.of(layer), kernel_shape(layer)
    if form.groups != 1 or len(decomposition.chain_axes(shape) or ()) < 2 or decomposition.has_basis:
        return False
    return form.kind not in TRANSPOSED or _are_views(decomposition, shape)


def _are_views(decomposition: Decomposition, shape: Shape) -> bool:
    """Whether the links of a chain are views of weights of transposed convolutions: one group, or one for a channel."""
    links = decomposition.links(shape, tuple(min(2, top) for top in decomposition.max_rank(shape)))
    channels = [shape[1], *(link[0] for link, _ in links or ())]
    return all(own[1] == n or own[:2] == (n, 1) for (own, _), n in zip(links or (), channels, strict=False))


def default_path(layer: nn.Module, decomposition: Decomposition) -> str:
    """The path if the costs are unknown."""
    shape = kernel_shape(layer)
    if decomposition.has_basis:
        return paths_of(decomposition, shape, decomposition.max_rank(shape), Form.of(layer).groups)[0]
    return CHAIN if is_chain(layer, decomposition) else REBUILT


def untrained(
    layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str | None = None, bits: int = FULL
) -> TensorizedLayer:
    """The tensorized form of `layer`, in training mode; the factors have the right shapes and arbitrary values.

    With fewer than 32 `bits` the scales of the factors' grids are 1. The factors take `requires_grad` from the layer's
    weight, the bias from its bias. Raises ConfigError for a path that the layer does not have.
    """
    decomposition = decomposition.for_shape(kernel_shape(layer))
    if is_table(layer):
        form = Table if decomposition == Dense() else LowRankTable
    else:
        form = Chain if is_chain(layer, decomposition) else Contracted
    result = form(layer, decomposition, rank, path)
    for factor in result.factor_parameters():
        factor.requires_grad_(layer.weight.requires_grad)
    bias = _bias_of(layer)
    if bias is not None:
        cast(nn.Parameter, result.bias).requires_grad_(bias.requires_grad)
    if bits != FULL:
        result.make_room_for_grids_(bits)
    return result


def tensorize(
    layer: DenseLayer,
    decomposition: Decomposition,
    rank: Rank,
    *,
    kernel: Tensor | None = None,
    metric: Metric | None = None,
    path: str | None = None,
    bits: int = FULL,
    known: Factors | None = None,
) -> TensorizedLayer:
    """Decomposes the kernel of `layer` and returns the layer that runs on the factors, in the same mode.

    Stride, padding (every mode), dilation, groups and bias are kept. If `kernel` is given (see
    `tspc.layers.dense.as_kernel`), it is decomposed instead of the layer's own. `metric` is the norm of the fit. With
    fewer than 32 `bits` the factors are rounded to grids, see `tspc.quantization.factors.quantized`. With `known`
    factors of the kernel there is nothing to decompose. Raises DecompositionError as `decompose` does, and ConfigError
    for a path that the layer does not have.
    """
    decomposition = decomposition.for_shape(kernel_shape(layer))
    kernel = kernel_of(layer).detach() if kernel is None else kernel
    factors = known or decomposition.decompose(kernel, rank, metric)
    result = untrained(layer, decomposition, rank, path)
    if bits != FULL:
        on_grids = quantized(decomposition, factors, kernel, bits, metric)
        factors = on_grids.factors
        result.put_on_(on_grids.grids)
    with torch.no_grad():
        for own, value in zip(result.factor_tensors(), factors.tensors, strict=True):
            own.copy_(value)
        if factors.basis is not None:
            result.get_buffer(BASIS).copy_(factors.basis)
        bias = _bias_of(layer)
        if bias is not None:
            cast(nn.Parameter, result.bias).copy_(bias)
    return result.train(layer.training)


def tensorized_layers(model: nn.Module, tables: bool = True) -> dict[str, TensorizedLayer]:
    """All tensorized layers of a network by name, in module order.

    Only with `tables` there are tables of embeddings among them, and layers that share their factors.
    """
    kept = {name: module for name, module in model.named_modules() if isinstance(module, TensorizedLayer)}
    if tables:
        return kept
    of_tables = {id(factor) for layer in kept.values() if isinstance(layer, Table) for factor in layer.factor_list}
    return {name: layer for name, layer in kept.items() if not of_tables & set(map(id, layer.factor_parameters()))}
