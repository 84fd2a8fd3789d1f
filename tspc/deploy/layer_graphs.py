"""Times one layer as it runs inside a network: a small ONNX graph of its convolutions, and a runtime's own clock.

A graph of one layer would also pay for the call and for changes of the layout, which a network pays once. So a small
1×1 convolution stands before the layer and another one behind it. The runtime notes the time of every operation, and
those between the two marks count.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tspc.deploy.calls import FLOAT32, family, precision
from tspc.deploy.programs import onnx_session
from tspc.deploy.runtimes import BFLOAT16, openvino_session
from tspc.errors import ExportError
from tspc.layers.chains import Stage
from tspc.layers.convolutions import Form

BEFORE, AFTER = "mark_before", "mark_after"
MARK = 16
"""Channels before the first mark and behind the second; runtimes work on blocks of 8 or 16."""
FEWEST, MOST, SECONDS = 5, 40, 0.03
"""A layer is run so often, and in between as often as it can in so many seconds."""
OPSET, IR = 17, 8


@dataclass(frozen=True)
class Operation:
    """One convolution. The kernel's `shape` is (out, in of one group, then the window); a dense layer has no window.

    `strides`, `pads` (of all axes before, then of all axes behind) and `dilations` are as in ONNX. A transposed
    convolution has `longer`, the padding of its output; else it is None.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    longer: tuple[int, ...] | None = None

    @property
    def channels(self) -> int:
        """Input channels."""
        return self.shape[1] * self.groups

    @property
    def is_dense(self) -> bool:
        return len(self.shape) == 2

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the constant in ONNX: (in, out of one group, window) for a transposed convolution."""
        return self.shape if self.longer is None else (self.channels, self.shape[0] // self.groups, *self.shape[2:])

    @property
    def operator(self) -> str:
        """The ONNX operator; a dense layer's takes its matrix transposed."""
        return "MatMul" if self.is_dense else "Conv" if self.longer is None else "ConvTranspose"

    @property
    def attributes(self) -> dict[str, Any]:
        """The operator's attributes."""
        if self.is_dense:
            return {}
        found = {"strides": self.strides, "pads": self.pads, "dilations": self.dilations, "group": self.groups}
        return found if self.longer is None else found | {"output_padding": self.longer}

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """Random weights that keep the size of the numbers."""
        return rng.standard_normal(self.weight_shape, np.float32) * np.float32(np.prod(self.shape[1:]) ** -0.5)

    def __str__(self) -> str:
        parts = (self.shape, self.strides, self.pads, self.dilations, (self.groups,))
        parts += () if self.longer is None else (self.longer,)
        return "/".join("x".join(map(str, part)) for part in parts)


def operations(form: Form, stages: Sequence[Stage]) -> tuple[Operation, ...]:
    """The convolutions of a path. Padding is by zeros, whatever the layer's mode is: it takes about as long."""
    return tuple(_operation(form, stage) for stage in stages)


def _operation(form: Form, stage: Stage) -> Operation:
    if not form.is_convolution:
        return Operation((stage.shape[0], stage.channels))
    sides = form.sides_along(stage.covered)
    pads = (*sides[-2::-2], *sides[-1::-2])  # F.pad begins with the last axis
    strides, dilations = form.along(stage.covered, form.stride, 1), form.along(stage.covered, form.dilation, 1)
    longer = form.along(stage.covered, form.output_padding, 0) if form.is_transposed(stage) else None
    shape = (*stage.shape[:2], *form.window_of(stage))
    return Operation(shape, strides, pads, dilations, stage.groups, longer)


def graph_of(
    parts: Sequence[Operation],
    shape: Sequence[int],
    kernels: Sequence[np.ndarray] | None = None,
    marked: bool = True,
) -> bytes:
    """An ONNX file of convolutions in sequence, for inputs of this shape, without a bias.

    The inputs of dense layers are (batch, rows, channels). Kernels are random by default. If the layer is `marked`, the
    inputs have MARK channels in the place of the layer's.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, known, last = np.random.default_rng(0), [], [], "input"
    named = {f"part{i}": part for i, part in enumerate(parts)}
    if marked:
        named = {BEFORE: _mark(parts[0], parts[0].channels, MARK)} | named
        named[AFTER] = _mark(parts[0], MARK, parts[-1].shape[0])
    own = dict(zip(named, kernels, strict=True)) if kernels is not None else {}
    for name, part in named.items():
        weight = own.get(name)
        if weight is None:
            weight = part.random(rng)
        constant = np.ascontiguousarray(weight.T if part.is_dense else weight)
        known.append(numpy_helper.from_array(constant, f"{name}.weight"))
        given = [last, f"{name}.weight"]
        nodes.append(helper.make_node(part.operator, given, [name], name=name, **part.attributes))
        last = name
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        for name, sizes in (("input", list(shape)), (last, None))
    ]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    return model.SerializeToString()


def _mark(like: Operation, outputs: int, inputs: int) -> Operation:
    axes = len(like.shape) - 2
    return Operation((outputs, inputs, *[1] * axes), (1,) * axes, (0,) * 2 * axes, (1,) * axes)


def seconds_of(parts: Sequence[Operation], batch: int, size: Sequence[int], runtime: str, threads: int) -> float:
    """The time of these convolutions in ONNX Runtime or OpenVINO, for a batch of inputs, on the CPU.

    It is the lower quartile of some runs, for other work of the machine only adds to it.
    `size` is that of the input's map: rows and columns, a length, or the rows of a dense layer. Of a runtime's name the
    family counts, and bfloat16. Raises ExportError if the runtime does not take the layer.
    """
    shape = (batch, *size, MARK) if parts[0].is_dense else (batch, MARK, *size)
    graph = graph_of(parts, shape)
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    find = _in_openvino if family(runtime) == "openvino" else _in_onnx
    found = sorted(_between(find(graph, x, runtime, threads)))
    if not found:
        raise ExportError(f"{runtime} reports no times of the operations")
    return found[len(found) // 4]


def _between(found: Sequence[tuple[str, float]]) -> Iterator[float]:
    """The seconds between the marks, for each run; `found` has the operations of all runs, in order."""
    total: float | None = None
    for name, seconds in found:
        if name == BEFORE:
            total = 0.0
        elif name == AFTER and total is not None:
            yield total
            total = None
        elif total is not None:
            total += seconds


def _repeated(run: Any) -> None:
    """Runs a layer as often as the limits say."""
    started, done = time.perf_counter(), 0
    while done < FEWEST or (done < MOST and time.perf_counter() - started < SECONDS):
        run()
        done += 1


def _in_onnx(graph: bytes, x: np.ndarray, runtime: str, threads: int) -> list[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        session = onnx_session(graph, threads, profile=Path(folder, "profile"))
        _repeated(lambda: session.run(None, {"input": x}))
        events = json.loads(Path(session.end_profiling()).read_text())
    ends = "_kernel_time"
    events = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(ends)]
    events.sort(key=lambda event: event["ts"])
    names = [event["name"].removesuffix(ends).removesuffix("_nchwc") for event in events]
    return [(name, event["dur"] * 1e-6) for name, event in zip(names, events, strict=True)]


def _in_openvino(graph: bytes, x: np.ndarray, runtime: str, threads: int) -> list[tuple[str, float]]:
    computes = BFLOAT16 if precision(runtime) == BFLOAT16 else FLOAT32
    request = openvino_session(graph, (torch.from_numpy(x),), computes, threads, profiles=True)
    found: list[tuple[str, float]] = []

    def run() -> None:
        request.infer([x])
        found.extend((entry.node_name, entry.real_time.total_seconds()) for entry in request.profiling_info)

    _repeated(run)
    return found
