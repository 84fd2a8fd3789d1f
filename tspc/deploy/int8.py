"""ONNX files whose weights and activations are 8-bit integers, for ONNX Runtime and OpenVINO.

ONNX Runtime's own quantizer writes them from the float32 file, in the QDQ format: a QuantizeLinear and a
DequantizeLinear stand around each layer. Weights have a scale for each output channel. Some images show the ranges of
the activations.

Where the factors of a layer lie on grids already (`TensorizedLayer.bits`), the file holds the same integers: the scales
of these weights are the grid's. The quantizer's own scales would round a second time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tspc.deploy.programs import Inputs, first_line, onnx_session, quiet, run_session
from tspc.deploy.stored_integers import factors_on_grids
from tspc.errors import ExportError

OPERATORS = (
    *(
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "Add",
        "Relu",
        "Clip",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Concat",
    ),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Pad"),
)
"""ONNX operators that compute with integers. Others, such as softmax and norms, lose much accuracy in 8 bits."""
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with weights."""
LOST = 0.01
"""Share of images with another class than in float32, above which the first and the last layer stay in float32."""
FAR = 0.05
"""The same for answers that are no classes: the relative error."""
SAME = 1e-4
"""Largest difference of a weight from a grid, relative to its row. Half a step of 8 bits is forty times as much."""


@dataclass(frozen=True)
class Int8:
    """How a file was made. `float_layers` is ("first", "last") if these stay in float32, else empty.

    `weights` is the number of quantised weights, and `on_grids` the number of those that have the network's own
    integers.
    """

    float_layers: tuple[str, ...]
    weights: int
    on_grids: int


def write_int8(source: Path, target: Path, model: nn.Module, images: Sequence[Inputs]) -> Int8:
    """Writes the float32 ONNX file `source` of `model` with 8-bit integers to `target`.

    `images` are batches of inputs; they show the ranges of the activations. First all layers are quantised. If the
    file then gives too many of the images another class (LOST; for other answers FAR), the first and the last layer
    stay in float32, in case that is better. Raises ExportError if the quantizer does not take the network, or finds no
    layer in it.
    """
    try:
        return _written(source, target, model, images)
    except (ExportError, OSError):
        raise
    except Exception as error:  # the quantizer raises errors of many kinds
        raise ExportError(f"ONNX Runtime cannot quantise the network: {first_line(error)}") from error


def _written(source: Path, target: Path, model: nn.Module, images: Sequence[Inputs]) -> Int8:
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as name, quiet("root"), _quiet_runtime():
        folder = Path(name)
        ready = folder / "ready.onnx"
        # Folds batch norms and contracts the kernels of merged links: only constants become integers.
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        graph = onnx.load(ready).graph
        overrides = _overrides(graph, model)
        nodes = [node.name for node, _ in _weighted(graph)]
        refused = [node.name for node, _ in _weighted(graph) if not _has_scales(node)]
        answers = _answers(ready, images)

        def tried(excluded: list[str]) -> tuple[Path, _Loss]:
            path = folder / f"without-{len(excluded)}.onnx"
            _quantize(ready, path, images, overrides, excluded + refused, folder / "ranges.json")
            return path, _loss(answers, _answers(path, images))

        best, loss = tried([])
        float_layers: tuple[str, ...] = ()
        edge = sorted({nodes[0], nodes[-1]}) if nodes else []
        if len(nodes) > len(edge) and loss.is_large:
            other, other_loss = tried(edge)
            if other_loss.key < loss.key:
                best, float_layers = other, ("first", "last")
        weights, kept = _counted(best, [weight.name for _, weight in _weighted(graph)], overrides)
        if not weights:
            raise ExportError("ONNX Runtime can quantise no layer of the network; export it to onnx instead")
        target.write_bytes(best.read_bytes())
    return Int8(float_layers, weights, kept)


@contextmanager
def _quiet_runtime() -> Iterator[None]:
    """Only errors from ONNX Runtime; its quantizer opens sessions that warn of what it left in the graph."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # the default


def _counted(path: Path, names: Sequence[str], overrides: dict[str, Any]) -> tuple[int, int]:
    """How many of the weights the file holds as integers, and how many of these have the scales that were given.

    The quantizer takes a larger scale for a channel whose bias would not fit in 32 bits otherwise.
    """
    import onnx
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    found = {name for name in names if f"{name}_quantized" in tensors}
    kept = 0
    for name in found & set(overrides):
        given = [channel["scale"] for channel in overrides[name]]
        kept += bool(np.allclose(given, numpy_helper.to_array(tensors[f"{name}_scale"]), rtol=1e-6, atol=0))
    return len(found), kept


def _quantize(
    ready: Path, path: Path, images: Sequence[Inputs], overrides: dict[str, Any], excluded: list[str], ranges: Path
) -> None:
    """Writes `ready` with integers to `path`. The ranges of the activations are kept in the file `ranges`."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = iter(_feeds(ready, images))

        def get_next(self) -> dict[str, Any]:
            return next(self._feeds, None)  # type: ignore[return-value]

    quantize_static(
        ready,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(OPERATORS),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
        calibration_cache_path=ranges,
        extra_options={
            "MatMulConstBOnly": True,  # not the products of attention
            "OpTypesToExcludeOutputQuantization": [
                "Gemm",
                "MatMul",
            ],  # the answer, and what goes into float32 operators
            "TensorQuantOverrides": overrides,
        },
    )


def _feeds(path: Path, images: Sequence[Inputs]) -> Iterator[dict[str, Any]]:
    names = [entry.name for entry in onnx_session(path).get_inputs()]
    for batch in images:
        yield {name: x.cpu().numpy() for name, x in zip(names, batch, strict=True)}


def _answers(path: Path, images: Sequence[Inputs]) -> list[Tensor]:
    session = onnx_session(path, torch.get_num_threads())
    return [answer for batch in images for answer in run_session(session, batch)]


@dataclass(frozen=True)
class _Loss:
    """The share of images with another class, None if the answers are no classes; and the answers' relative error."""

    other: float | None
    error: float

    @property
    def is_large(self) -> bool:
        return self.error > FAR if self.other is None else self.other > LOST

    @property
    def key(self) -> tuple[float, float]:
        return self.other or 0.0, self.error


def _loss(wanted: list[Tensor], given: list[Tensor]) -> _Loss:
    pairs = list(zip(wanted, given, strict=True))
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    classes = [(a.argmax(1), b.argmax(1)) for a, b in pairs if a.ndim == 2 and a.shape[1] > 1]
    count = sum(len(a) for a, _ in classes)
    other = sum(int((a != b).sum()) for a, b in classes)
    return _Loss(other / count if count else None, (error / size) ** 0.5 if size else 0.0)


def _weighted(graph: Any) -> list[tuple[Any, Any]]:
    """The nodes with a constant weight, in order, each with its weight."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in constants]
    return [(node, constants[node.input[1]]) for node in nodes]


def _has_scales(node: Any) -> bool:
    """Whether the quantizer has a scale for each output channel; of groups of a transposed convolution it has not."""
    return node.op_type != "ConvTranspose" or all(a.i == 1 for a in node.attribute if a.name == "group")


def _axis(node: Any, weight: Any) -> int:
    """The axis of the output channels."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return int(node.op_type == "ConvTranspose")
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return len(weight.dims) - 1


def _overrides(graph: Any, model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """For each weight on a grid of the network the scale of each channel, as the quantizer takes it."""
    from onnx import numpy_helper

    known = _rows_on_grids(model)
    found: dict[str, list[dict[str, Any]]] = {}
    for node, weight in _weighted(graph):
        axis = _axis(node, weight)
        rows = torch.from_numpy(numpy_helper.to_array(weight).copy()).movedim(axis, 0).flatten(1).double()
        options = (_scales_of(rows, *each) for each in known if each[0].shape == rows.shape)
        scales = next((option for option in options if option is not None), None)
        if scales is not None:
            found[weight.name] = [
                {"axis": axis, "scale": np.float32(scale), "zero_point": np.int8(0)} for scale in scales.tolist()
            ]
    return found


def _rows_on_grids(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The factors on grids of at most 8 bits: values (rows × entries of a row) and the scale of each row."""
    found = []
    for factor, grid in factors_on_grids(model):
        if grid.bits <= 8:
            values = grid.rounded(factor).cpu().flatten(1).double()
            found.append((values, grid.scales.detach().cpu().double().expand(len(values))))
    return found


def _scales_of(rows: Tensor, values: Tensor, scales: Tensor) -> Tensor | None:
    """The scales of `rows` if each is a multiple of a row of `values`, which has these scales; else None.

    A batch norm that was folded into the weight has multiplied its rows.
    """
    sizes = values.square().sum(1)
    shares = torch.where(sizes > 0, (rows * values).sum(1) / sizes.clamp_min(1e-300), 1.0)
    far = (rows - shares[:, None] * values).abs().amax(1)
    if not bool((far <= SAME * rows.abs().amax(1)).all()):
        return None
    return torch.where(shares == 0, 1.0, shares.abs()) * scales
