"""ONNX files in which factors on grids are integers, of as many bits as they have.

The graph computes the floating-point numbers from them. All that it needs for this is constant, so a runtime does it
once, when it loads the file: the file is small, and the network runs as if the numbers were in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tspc.deploy.programs import onnx_program
from tspc.deploy.signature import Inputs, Signature
from tspc.layers.forms import tensorized_layers

SAME = 1e-5
"""Rows are multiples of others if no entry differs by more, relative to the largest one of its row."""
LEAST = 256
"""Constants with fewer entries stay as they are: the nodes of a graph take room, too."""
WORD = 32
"""Integers of fewer than 8 bits lie side by side in words of so many bits."""


class Rows(NamedTuple):
    """A factor on a grid: its integers (rows × entries of a row), the scale of each row, and the bits of an integer."""

    integers: Tensor
    scales: Tensor
    bits: int


def write_onnx(network: nn.Module, program: ExportedProgram, inputs: Inputs, signature: Signature, path: Path) -> None:
    """Writes a traced network; its factors on grids are stored as integers. Raises what `onnx_program` raises."""
    made = onnx_program(program, inputs, signature)
    _store_integers_(made.model.graph, rows_on_grids(network))
    made.save(str(path), external_data=False)


def rows_on_grids(network: nn.Module) -> list[Rows]:
    """The factors on grids, in float64. Layers that share a factor have it several times."""
    found = []
    for layer in tensorized_layers(network).values():
        for factor, grid in zip(layer.factor_tensors(), layer.grids, strict=False):  # none with 32 bits
            integers = grid.integers(factor.detach()).cpu().flatten(1).double()
            scales = grid.scales.detach().cpu().double().expand(len(integers))
            found.append(Rows(integers, scales, grid.bits))
    return found


def signed_scales(rows: Tensor, grid: Rows) -> Tensor | None:
    """The scales, with signs, by which the integers of a grid become these rows; None if they do not.

    A batch norm that was folded into a weight has multiplied its rows, which have the grid's own scales otherwise.
    """
    values = grid.integers * grid.scales[:, None]
    sizes = values.square().sum(1)
    shares = torch.where(sizes > 0, (rows * values).sum(1) / sizes.clamp_min(1e-300), 1.0)
    far = (rows - shares[:, None] * values).abs().amax(1)
    return shares * grid.scales if bool((far <= SAME * rows.abs().amax(1)).all()) else None


def _store_integers_(graph: Any, known: list[Rows]) -> None:
    """Replaces constants of a graph that are factors on grids, or such matrices transposed.

    In their place are integers, a scale for each row, and their product.
    """
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()) if known else ():
        constant = value.const_value
        if constant is None or constant.dtype != ir.DataType.FLOAT or constant.size < LEAST or value.is_graph_output():
            continue
        values = torch.from_numpy(constant.numpy().copy())
        ways = (values, values.T) if values.ndim == 2 else (values,)
        found = next(((own, grid) for own in ways if (grid := _matching(own, known)) is not None), None)
        if found is None:
            continue
        own, grid = found
        nodes = list(_Numbers(graph, name).made(grid, tuple(own.shape)))
        if own is not values:
            nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]]))
        graph.insert_before(graph[0], nodes)
        made = nodes[-1].outputs[0]
        made.shape, made.type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, made)
        del graph.initializers[name]
        made.name = name


def _matching(values: Tensor, known: list[Rows]) -> Rows | None:
    """The grid that has these values, in the same order, with the scales by which it has them."""
    for grid in known:
        if grid.integers.numel() != values.numel():
            continue
        rows = values.reshape(grid.integers.shape)
        # One row tells most others apart.
        if signed_scales(rows[:1].double(), Rows(grid.integers[:1], grid.scales[:1], grid.bits)) is None:
            continue
        scales = signed_scales(rows.double(), grid)
        if scales is not None:
            return grid._replace(scales=scales)
    return None


class _Numbers:
    """Makes the nodes that compute one constant of a graph from integers."""

    def __init__(self, graph: Any, name: str) -> None:
        self._graph, self._name = graph, name

    def made(self, grid: Rows, shape: tuple[int, ...]) -> Iterator[Any]:
        """Nodes; the last one gives the constant in its shape."""
        import onnx_ir as ir

        rows = len(grid.integers)
        own = shape if shape[0] == rows else tuple(grid.integers.shape)
        scales = grid.scales[:1] if bool((grid.scales == grid.scales[0]).all()) else grid.scales
        if grid.bits >= 8:
            whole = self._constant("integers", grid.integers.numpy().astype(f"int{grid.bits}").reshape(own))
            nodes = [ir.node("Cast", [whole], attributes={"to": ir.DataType.FLOAT})]
        else:
            nodes = list(self._out_of_words(grid, own))
        yield from nodes
        spread = scales.float().reshape(-1, *(1 for _ in own[1:])).numpy()
        yield (product := ir.node("Mul", [nodes[-1].outputs[0], self._constant("scales", spread)]))
        if own != shape:
            yield ir.node("Reshape", [product.outputs[0], self._constant("shape", np.array(shape))])

    def _out_of_words(self, grid: Rows, own: tuple[int, ...]) -> Iterator[Any]:
        """Nodes that take the integers out of words; the last one gives them as floating-point numbers."""
        import onnx_ir as ir

        each, base, largest = WORD // grid.bits, 2**grid.bits, 2 ** (grid.bits - 1) - 1
        places = base ** np.arange(each, dtype=np.int64)
        digits = grid.integers.flatten().numpy().astype(np.int64) + largest  # none is negative
        digits = np.pad(digits, (0, -len(digits) % each)).reshape(-1, each)
        words = self._constant("integers", (digits * places).sum(1, keepdims=True).astype(np.uint32))
        yield (wide := ir.node("Cast", [words], attributes={"to": ir.DataType.INT64}))
        yield (higher := ir.node("Div", [wide.outputs[0], self._constant("places", places)]))
        yield (lowest := ir.node("Mod", [higher.outputs[0], self._constant("base", np.array(base))]))
        yield (flat := ir.node("Reshape", [lowest.outputs[0], self._constant("flat", np.array([-1]))]))
        ends = [self._constant(key, np.array([end])) for key, end in (("start", 0), ("end", grid.integers.numel()))]
        yield (cut := ir.node("Slice", [flat.outputs[0], *ends]))
        yield (formed := ir.node("Reshape", [cut.outputs[0], self._constant("rows", np.array(own))]))
        yield (signed := ir.node("Sub", [formed.outputs[0], self._constant("zero", np.array(largest))]))
        yield ir.node("Cast", [signed.outputs[0]], attributes={"to": ir.DataType.FLOAT})

    def _constant(self, of: str, values: np.ndarray) -> Any:
        import onnx_ir as ir

        tensor = ir.tensor(values, name=f"{self._name}.{of}")
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(values.shape)
        made = ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=kind)
        self._graph.register_initializer(made)
        return made
