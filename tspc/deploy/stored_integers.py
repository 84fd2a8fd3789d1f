"""Factors on grids in an ONNX graph, stored as integers of as many bits as they have.

The graph computes the floating-point numbers from them. All that it needs for this is constant, so a runtime does it
once, when it loads the file: the file is small, and the network runs as if the numbers were in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tspc.layers.forms import tensorized_layers
from tspc.quantization.grids import Grid

LEAST = 256
"""Constants with fewer entries stay as they are: the nodes of a graph take room, too."""
LONG_WORD = 30
"""Of a word of 32 bits so many are used, so that it is a positive number in int32."""


def store_integers_(graph: Any, network: nn.Module) -> set[Any]:
    """Replaces the constants of a graph that are factors of `network` on grids.

    In the place of each are its integers, a scale for each row, and nodes that compute their product. Returns these
    nodes, which an optimizer must not fold.
    """
    import onnx_ir as ir

    known, stored, numbers = _by_content(network), set[Any](), _Numbers(graph)
    for name, value in list(graph.initializers.items()) if known else ():
        constant = value.const_value
        if constant is None or constant.size < LEAST or value.is_graph_output():
            continue
        found = known.get(_print(constant.numpy()))
        if found is None:
            continue
        nodes = list(numbers.made(name, *found, tuple(constant.shape.numpy()), constant.dtype))
        graph.insert_before(graph[0], nodes)
        made = nodes[-1].outputs[0]
        made.shape, made.type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, made)
        del graph.initializers[name]
        made.name = name
        stored.update(nodes)
    return stored


def factors_on_grids(network: nn.Module) -> Iterator[tuple[Tensor, Grid]]:
    """The factors on grids, each with its grid. Layers that share a factor have it several times."""
    for layer in tensorized_layers(network).values():
        for factor, grid in zip(layer.factor_tensors(), layer.grids, strict=False):  # none with 32 bits
            yield factor.detach(), grid


def _by_content(network: nn.Module) -> dict[str, tuple[Tensor, Grid]]:
    """The factors on grids, each under a print of its values."""
    found = {}
    for factor, grid in factors_on_grids(network):
        values = grid.rounded(factor).cpu() + 0.0  # no zero has a sign, as none has in the graph
        bits = values.contiguous().view(torch.int16) if values.dtype == torch.bfloat16 else values
        found[_print(bits.numpy())] = factor, grid
    return found


def _print(values: np.ndarray) -> str:
    return f"{values.itemsize} {hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()}"


class _Numbers:
    """Makes the nodes that compute constants of a graph from integers."""

    def __init__(self, graph: Any) -> None:
        self._graph, self._shared = graph, dict[tuple[str, str], Any]()

    def made(self, name: str, factor: Tensor, grid: Grid, shape: tuple[int, ...], dtype: Any) -> Iterator[Any]:
        """Nodes; the last one gives the constant of this name, in its shape and number format."""
        import onnx_ir as ir

        wide = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        whole = grid.integers(factor).cpu().numpy()
        if grid.bits >= 8:
            integers = [self._constant(f"{name}.integers", whole.astype(f"int{grid.bits}"))]
        else:
            nodes = list(self._out_of_words(f"{name}.integers", whole.astype(np.int64), grid))
            yield from nodes
            integers = nodes[-1].outputs
        yield (numbers := ir.node("Cast", integers, attributes={"to": wide}))
        if grid.bits < 8:  # words hold no sign
            zero = np.array(grid.largest, wide.numpy())
            yield (numbers := ir.node("Sub", [numbers.outputs[0], self._shared_constant("zero", zero)]))
        spread = grid.scales.detach().cpu().numpy().astype(wide.numpy()).reshape(-1, *(1 for _ in whole.shape[1:]))
        yield (last := ir.node("Mul", [numbers.outputs[0], self._constant(f"{name}.scales", spread)]))
        if whole.shape != shape:
            yield (last := ir.node("Reshape", [last.outputs[0], self._shared_constant("shape", np.array(shape))]))
        if dtype != wide:
            yield ir.node("Cast", [last.outputs[0]], attributes={"to": dtype})

    def _out_of_words(self, name: str, whole: np.ndarray, grid: Grid) -> Iterator[Any]:
        """Nodes that take integers out of words; the last one gives them, each larger by the largest, in 8 bits."""
        import onnx_ir as ir

        is_short = grid.bits <= 5
        each, base = (16 if is_short else LONG_WORD) // grid.bits, 2**grid.bits
        places = base ** np.arange(each, dtype=np.int64)
        digits = whole.flatten() + grid.largest
        digits = np.pad(digits, (0, -len(digits) % each)).reshape(-1, each)
        words = (digits * places).sum(1, keepdims=True)
        stored = self._constant(name, words.astype(np.uint16 if is_short else np.int32))
        yield (words := ir.node("Cast", [stored], attributes={"to": ir.DataType.INT32}))
        yield (higher := ir.node("Div", [words.outputs[0], self._shared_constant("places", places.astype(np.int32))]))
        yield (lowest := ir.node("Mod", [higher.outputs[0], self._shared_constant("base", np.array(base, np.int32))]))
        # In 8 bits before anything else: a runtime keeps all steps until it has loaded the file.
        yield (narrow := ir.node("Cast", [lowest.outputs[0]], attributes={"to": ir.DataType.UINT8}))
        if digits.size > whole.size:
            flat = self._shared_constant("shape", np.array([-1]))
            yield (narrow := ir.node("Reshape", [narrow.outputs[0], flat]))
            ends = [self._shared_constant("end", np.array([end])) for end in (0, whole.size)]
            yield (narrow := ir.node("Slice", [narrow.outputs[0], *ends]))
        yield ir.node("Reshape", [narrow.outputs[0], self._shared_constant("shape", np.array(whole.shape))])

    def _shared_constant(self, of: str, values: np.ndarray) -> Any:
        """A constant that all factors with the same one share."""
        key = of, f"{values.dtype} {values.tolist()}"
        if key not in self._shared:
            self._shared[key] = self._constant(f"integers.{of}.{len(self._shared)}", values)
        return self._shared[key]

    def _constant(self, name: str, values: np.ndarray) -> Any:
        import onnx_ir as ir

        tensor = ir.tensor(values, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(values.shape)
        made = ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=kind)
        self._graph.register_initializer(made)
        return made
