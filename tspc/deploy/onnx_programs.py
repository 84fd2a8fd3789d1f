"""A traced network as ONNX operators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tspc.deploy.programs import EXPORTERS, first_line, flat, has_free_lengths, quiet
from tspc.deploy.signature import Inputs, Signature
from tspc.deploy.stored_integers import store_integers_
from tspc.errors import ExportError

PROTOBUF_LIMIT = 2**31 - 2**24
"""The largest number of bytes of weights in an ONNX file, with some room for the graph."""
PROJECTION = "weight_hr_l"
"""How the names of an LSTM's projections begin."""
FOLDED = 1024
"""The largest number of entries of a computed constant in an ONNX file."""


def write_onnx(network: nn.Module, program: ExportedProgram, inputs: Inputs, signature: Signature, path: Path) -> None:
    """Writes a traced network as an ONNX file. Raises what `onnx_program` raises."""
    onnx_program(program, inputs, signature, network).save(str(path), external_data=False)


def onnx_program(
    program: ExportedProgram, inputs: Inputs, signature: Signature | None = None, network: nn.Module | None = None
) -> Any:
    """`program` as ONNX operators. Its inputs have the names of the network's arguments, or `input`, `input1`, ….

    Where the network answers with a dict, the outputs have its keys. The factors of `network` that lie on grids are
    stored as integers.

    Raises ExportError if it has an operator that ONNX lacks, or too many weights.
    """
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > PROTOBUF_LIMIT:
        raise ExportError(f"{size:,} bytes of weights are more than one ONNX file can hold; export to pt2 instead")
    if any(name.rpartition(".")[2].startswith(PROJECTION) for name in program.state_dict):
        raise ExportError("ONNX has no LSTM with projections (proj_size); export to pt2 instead")
    from onnxscript import optimizer

    signature = signature or Signature(len(inputs))
    args, kwargs = signature.arguments(inputs)
    shapes = tuple(signature.shapes(inputs, has_free_lengths(program, signature, inputs)))
    try:
        with quiet(*EXPORTERS):
            made: Any = torch.onnx.export(
                program,
                args,
                kwargs=kwargs or None,
                verbose=False,
                input_names=signature.input_names,
                dynamic_shapes=shapes,
                optimize=False,
            )
            stored = set[Any]() if network is None else store_integers_(made.model.graph, network)
            # Kernels stay factors in the file; a runtime contracts them once, when it loads it.
            fold = lambda node: False if node in stored else None  # noqa: E731
            optimizer.optimize_ir(made.model, output_size_limit=FOLDED, should_fold=fold)
    except Exception as error:  # torch.onnx's own family, onnxscript's, onnx-ir's
        raise ExportError(f"the network cannot be written as ONNX: {first_line(error)}") from error
    graph = made.model.graph
    outputs = (value for node in graph.all_nodes() for value in node.outputs)
    for part in (graph, *graph.all_nodes(), *graph.inputs, *graph.initializers.values(), *outputs):
        part.metadata_props.clear()  # stack traces, with paths of this machine, and the tracer's notes
    _name_outputs_(made.model.graph, output_names(program))
    return made


def output_names(program: ExportedProgram) -> list[str]:
    """For each tensor in a network's answer its key in a dict, with numbers if there are several; "" without keys."""
    nodes = program.graph_signature.user_outputs
    form = program.call_spec.out_spec
    assert form is not None
    given = [torch.tensor(place) if isinstance(node, str) else None for place, node in enumerate(nodes)]
    answer = pytree.tree_unflatten(given, form)
    if not isinstance(answer, Mapping):
        return ["" for _ in flat(answer)]
    found = {str(name): len(flat(value)) for name, value in answer.items()}
    return [name if count == 1 else f"{name}_{i}" for name, count in found.items() for i in range(count)]


def _name_outputs_(graph: Any, names: list[str]) -> None:
    """Gives the outputs of an ONNX graph these names, unless something else in it has one of them."""
    nodes = list(graph.all_nodes())
    taken = {value.name for value in (*graph.inputs, *(value for node in nodes for value in node.outputs))}
    taken |= set(graph.initializers)
    outputs = list(graph.outputs)
    is_own = len(set(map(id, outputs))) == len(names) and not set(map(id, outputs)) & set(map(id, graph.inputs))
    for output, name in zip(outputs, names, strict=True) if is_own else ():
        if name and name not in taken:
            output.name = name
            taken.add(name)
