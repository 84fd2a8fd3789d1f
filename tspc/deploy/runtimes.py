"""Opens exported files in the runtimes that run them without tspc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tspc.deploy.programs import first_line, flat, not_taken, onnx_session, run_session
from tspc.deploy.signature import Inputs
from tspc.errors import ExportError

Answer = Callable[[Inputs], list[Tensor]]

BFLOAT16 = "bfloat16"


class Answering(nn.Module):
    """An opened file as a network: its first answer to a batch.

    Arguments by name come in the order in which the file has them, which is that of the example it was made with.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self._answer((*inputs, *named.values()))[0]


def opened(path: Path, format: str, threads: int | None = None) -> Answer:
    """What an exported file answers to inputs on the CPU, in ONNX Runtime (`onnx`, `int8`) or torch.export (`pt2`).

    Raises ExportError if ONNX Runtime does not take the file, or the file does not take the inputs.
    """
    if format == "pt2":
        with path.open("rb") as file:  # with a path, torch requires its own ending
            program = torch.export.load(file)
        network, form = program.module(), program.call_spec.in_spec
        assert form is not None

        def answer(inputs: Inputs) -> list[Tensor]:
            args, kwargs = pytree.tree_unflatten(list(inputs), form)
            try:
                return flat(network(*args, **kwargs))
            except Exception as error:  # the graph has assertions of its own
                raise not_taken(inputs, error) from error

        return answer
    session = onnx_session(path, threads)
    return lambda inputs: run_session(session, inputs)


def openvino_session(graph: Path | bytes, inputs: Inputs, precision: str, threads: int, profiles: bool = False) -> Any:
    """An OpenVINO request that runs an ONNX file, or its bytes, on the CPU, for batches of the size of `inputs`.

    `precision` is that of all that the file does not hold as integers: float32 or bfloat16. With `profiles` it notes
    the time of every operation. Raises ExportError if OpenVINO does not take the file, or the processor has no
    bfloat16.
    """
    import openvino

    core = openvino.Core()
    if precision == BFLOAT16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ExportError("this processor has no bfloat16, so OpenVINO would compute in float32")
    hint = {BFLOAT16: openvino.Type.bf16}.get(precision, openvino.Type.f32)
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": profiles,
    }
    try:
        model = core.read_model(graph)
        # OpenVINO plans better if it knows the size of the batch.
        model.reshape({port: list(x.shape) for port, x in zip(model.inputs, inputs, strict=True)})
        return core.compile_model(model, "CPU", settings).create_infer_request()
    except Exception as error:  # OpenVINO's own family
        raise ExportError(f"OpenVINO does not take the network: {first_line(error)}") from error


def run_openvino(request: Any, inputs: Inputs) -> list[Tensor]:
    """The answers of `openvino_session` to inputs of its batch size."""
    found = request.infer([x.detach().cpu().contiguous().numpy() for x in inputs])
    return [torch.from_numpy(value.copy()) for value in found.values()]
