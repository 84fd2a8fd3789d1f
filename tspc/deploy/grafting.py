"""Puts chains of convolutions with random kernels into the ONNX graph of a dense network.

It is what the export of the compressed network would give, up to the values, but without tracing: a second in the place
of ten or more. Only the time of such a graph means something.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from tspc.deploy.layer_graphs import Operation
from tspc.layers.convolutions import Form
from tspc.layers.dense import kernel_of

KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def grafted(graph: bytes, model: nn.Module, chains: Mapping[str, Sequence[Operation]]) -> bytes | None:
    """The graph with each named layer of `model` replaced by these convolutions, as the bytes of a file.

    None if a layer is not found in the graph, for example because its padding is an operation of its own.
    """
    import onnx

    if any(Form.of(model.get_submodule(name)).padding_mode != "zeros" for name in chains):
        return None
    made = onnx.load_from_string(graph)
    known = {tensor.name: tensor for tensor in made.graph.initializer}
    owners = _owners(model, chains, known)
    rng, nodes, replaced = np.random.default_rng(0), [], set()
    for node in made.graph.node:
        weight = node.input[1] if node.op_type in KINDS and len(node.input) > 1 else ""
        name = owners.get(weight)
        if name is None:
            nodes.append(node)
            continue
        replaced.add(name)
        new, weights = _chain(node, f"{name}.{len(nodes)}", chains[name], rng)
        nodes += new
        made.graph.initializer.extend(weights)
    if replaced != set(chains):
        return None
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in made.graph.initializer if tensor.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made.SerializeToString()


def _owners(model: nn.Module, names: Iterable[str], known: Mapping[str, Any]) -> dict[str, str]:
    """The layers of the constants in the graph that hold their kernels.

    A convolution's constant has its name. Another layer's may be transposed and renamed; it is known by its values.
    """
    from onnx import numpy_helper

    found, matrices = {}, {}
    for name in names:
        layer = model.get_submodule(name)
        if Form.of(layer).is_convolution:
            found[f"{name}.weight"] = name
        else:
            kernel = kernel_of(layer).detach().cpu().numpy()
            matrices |= {_print(kernel): name, _print(kernel.T): name}
    if matrices:
        for key, tensor in known.items():
            if len(tensor.dims) == 2 and (name := matrices.get(_print(numpy_helper.to_array(tensor)))) is not None:
                found[key] = name
    return found


def _print(matrix: np.ndarray) -> tuple[tuple[int, ...], str]:
    return matrix.shape, hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()


def _chain(node: Any, name: str, parts: Sequence[Operation], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Nodes in the place of one, and their constants; the last one has its bias."""
    from onnx import helper, numpy_helper

    nodes, weights, last = [], [], node.input[0]
    for i, part in enumerate(parts):
        is_end, own = i == len(parts) - 1, f"{name}.part{i}"
        values, operator = part.random(rng), part.operator
        options: dict[str, Any] = part.attributes
        if node.op_type == "Gemm":
            operator, options = "Gemm", {"transB": 1}
        elif part.is_dense:
            values = np.ascontiguousarray(values.T)
        weights.append(numpy_helper.from_array(values, f"{own}.weight"))
        bias = list(node.input[2:]) if is_end else []
        output = node.output[0] if is_end else own
        nodes.append(helper.make_node(operator, [last, f"{own}.weight", *bias], [output], name=own, **options))
        last = output
    return nodes, weights
