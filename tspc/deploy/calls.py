"""Calls that run a network on one batch, in each runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tspc.deploy.graphs import Graphs
from tspc.deploy.programs import first_line, onnx_session, quiet, run_session
from tspc.deploy.runtimes import BFLOAT16, openvino_session, run_openvino
from tspc.deploy.signature import Inputs, Signature
from tspc.errors import ExportError
from tspc.system import extras
from tspc.traversal.copying import copied

FLOAT32 = "float32"
USUAL = ("eager", "compile", "onnx")
"""The runtimes without a choice; of these one that is not installed is left out."""
RUNTIMES = (*USUAL, "onnx-int8", "openvino", "openvino-bfloat16", "openvino-int8")
"""A name is a family and, after a hyphen, the precision; without one it is the network's own precision."""
EXTRAS = {"onnx": "onnx", "openvino": "openvino"}
"""For each family of runtimes the extra that installs it."""

Run = Callable[[], object]
Sessions = dict[tuple[str, str], Any]
"""Sessions of ONNX Runtime by network and runtime; they take any batch size."""


class Unusable(Exception):
    """Why a runtime cannot run the network."""


def family(runtime: str) -> str:
    """The runtime without its precision."""
    return runtime.partition("-")[0]


def precision(runtime: str) -> str:
    """The precision in a runtime's name; float32 stands for the network's own."""
    return runtime.partition("-")[2] or FLOAT32


def call(graphs: Graphs, side: str, runtime: str, batch: Inputs, sessions: Sessions | None = None) -> Run:
    """A call that runs the batch in the network named `side`, and has run it at least once outside of eager PyTorch.

    `sessions` keeps what other batch sizes can use, too. Raises Unusable if the runtime is not installed, or does not
    take the network or the batch.
    """
    name = family(runtime)
    if name not in EXTRAS:
        return _prepared(graphs.networks[side], batch, runtime, graphs.signature)
    lack = extras.missing(EXTRAS[name])
    if lack is not None:
        raise Unusable(lack)
    try:
        if name == "openvino":
            return _in_openvino(graphs, side, runtime, batch)
        kept = {} if sessions is None else sessions
        if (side, runtime) not in kept:
            kept[side, runtime] = _session(graphs, side, runtime, batch)
        return _in_session(kept[side, runtime], batch)
    except ExportError as error:
        raise Unusable(str(error)) from error


def _prepared(model: nn.Module, batch: Inputs, runtime: str, signature: Signature) -> Run:
    """A call that runs the batch in PyTorch. Raises Unusable."""
    network = copied(model).eval()
    if runtime == "eager":
        return lambda: signature.call(network, batch)
    compiled = torch.compile(network, dynamic=False)

    def run() -> object:
        return signature.call(compiled, batch)

    try:
        with quiet("torch.utils.cpp_extension"):  # it says that there is no GPU
            run()
    except Exception as error:  # no compiler, or a network that it does not take
        lines = str(error).splitlines()
        raise Unusable(f"torch.compile: {type(error).__name__}: {lines[0] if lines else ''}") from error
    return run


def _session(graphs: Graphs, side: str, runtime: str, batch: Inputs) -> Any:
    """The network in ONNX Runtime. Raises Unusable, ExportError."""
    import onnxruntime

    device = batch[0].device
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers() or device.type == "mps":
        raise Unusable(f"this ONNX Runtime does not run on {device.type}")
    return onnx_session(graphs.graph(side, precision(runtime)), torch.get_num_threads(), (provider,))


def _in_session(session: Any, batch: Inputs) -> Run:
    """A call that runs the batch. Raises Unusable."""
    try:
        run_session(session, batch)
    except Exception as error:  # ONNX Runtime's own family, or a type of number that it does not take
        raise Unusable(f"ONNX Runtime: {first_line(error)}") from error
    feed = {entry.name: x.cpu().numpy() for entry, x in zip(session.get_inputs(), batch, strict=True)}
    return lambda: session.run(None, feed)


def _in_openvino(graphs: Graphs, side: str, runtime: str, batch: Inputs) -> Run:
    """A call that runs the batch. Raises Unusable, ExportError."""
    if batch[0].device.type != "cpu":
        raise Unusable("OpenVINO is timed on the CPU only: device=cpu")
    graph = graphs.graph(side, precision(runtime))
    computes = BFLOAT16 if precision(runtime) == BFLOAT16 else FLOAT32
    request = openvino_session(graph, batch, computes, torch.get_num_threads())
    try:
        run_openvino(request, batch)
    except Exception as error:  # OpenVINO's own family
        raise Unusable(f"OpenVINO: {first_line(error)}") from error
    given = [x.contiguous().numpy() for x in batch]
    return lambda: request.infer(given)
