"""Files that run without tspc: written, read back, run, and kept only if they give the network's answers.

A file of 8-bit integers gives other answers by its nature. It is kept, and what it loses is measured and told.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from tspc.deploy.int8 import Int8, write_int8
from tspc.deploy.onnx_programs import write_onnx
from tspc.deploy.programs import first_line, flat, has_free_lengths, long_enough, on_cpu, take, traced
from tspc.deploy.runtimes import Answer, opened
from tspc.deploy.signature import Call, Inputs, Signature
from tspc.errors import ExportError, TspcWarning
from tspc.layers.forms import tensorized_layers
from tspc.models.weights import load_state
from tspc.store.files import write_atomically
from tspc.store.state import packed, tensor_state
from tspc.system import extras
from tspc.system.launch import is_first
from tspc.system.modes import own_modes

FORMATS = ("onnx", "pt2", "safetensors")
"""The formats whose answers are the network's; they are also the endings of the files."""
INT8 = "int8"
"""ONNX with 8-bit integers."""
ENDINGS = {INT8: "int8.onnx"} | {name: name for name in FORMATS}
"""The formats and the endings of their files; longer endings first."""
RUNTIMES_OF = {"onnx": "ONNX Runtime", INT8: "ONNX Runtime", "pt2": "torch.export", "safetensors": None}
"""What a file is run with; None if it needs a network that loads it."""
ROUNDINGS = 4
"""The answers of a file may differ by so many roundings of the network's number format."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    `difference` is the largest difference between its answers and the network's, over all entries of `samples` inputs.
    `relative` is this divided by the network's largest answer. `runtime` is what the file was run with; None for the
    state dict. `int8` says how a file of 8-bit integers was made.
    """

    format: str
    file: str
    bytes: int
    difference: float
    relative: float
    samples: int
    runtime: str | None
    precision: str
    int8: Int8 | None = None

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if self.int8 is None:
            del found["int8"]
        return found


def check_formats(formats: tuple[str, ...]) -> None:
    """Raises ConfigError if a format needs packages that are not installed."""
    if {"onnx", INT8} & set(formats):
        extras.require("onnx", "the export to ONNX (formats=[pt2,safetensors] leaves it out)")


def export(
    model: nn.Module,
    path: str | Path,
    inputs: Call,
    *,
    tolerance: float = 1e-4,
    format: str | None = None,
    calibration: Sequence[Call] | None = None,
) -> Exported:
    """Writes `model` for use elsewhere: `.onnx`, `.pt2` (torch.export), or `.safetensors` (the state dict alone).

    `.onnx` and `.pt2` run without tspc; a state dict needs a network that loads it. `inputs` is a tensor, a tuple of
    tensors, or a dict or `ModelInputs` with the network's arguments by name; batch first. The graph takes them by the
    same names. Its batch size is free, and so is the number of tokens, axis 1 of token numbers and masks; if the
    network's control flow depends on that number it is fixed, and a warning says so. A decoder of transformers is
    written without caches. The file is read back and tried on `inputs`, as a batch, one by one, and with fewer tokens.
    The network is written in eval mode, on the CPU.

    `.int8.onnx` (or `format="int8"`) is ONNX with 8-bit integers. Its answers are near the network's, but not within
    the tolerance. `calibration` are batches of inputs that show the ranges of its activations; by default `inputs`.

    Raises ExportError if the network cannot take the inputs or be traced, if the file cannot be run, or if its answers
    differ by more than `tolerance`, relative to the network's largest answer; in bfloat16 or float16 by more than four
    roundings, if that is more. An older file of this name is then kept.
    Raises ConfigError if packages are missing. Of several processes only the first one keeps its file.
    """
    path = Path(path)
    endings = (name for name, ending in ENDINGS.items() if path.name.endswith(f".{ending}"))
    format = format or next(endings, path.suffix.removeprefix("."))
    if format not in ENDINGS:
        raise ExportError(f"{path}: cannot export as {format!r}; choose one of {', '.join((*FORMATS, INT8))}")
    check_formats((format,))
    return Exporter(model, inputs, tolerance, calibration).write(path, format)


class Exporter:
    """Writes one network in several formats; it is traced once. Raises ExportError if it cannot take the inputs."""

    @own_modes()
    def __init__(
        self,
        model: nn.Module,
        inputs: Call,
        tolerance: float,
        calibration: Sequence[Call] | None = None,
    ) -> None:
        self.model, self.signature = on_cpu(model), Signature.of(model, inputs)
        self.precision = _precision(self.model)
        number = torch.finfo(getattr(torch, self.precision))
        self.tolerance = max(tolerance, ROUNDINGS * number.eps if number.bits < 32 else 0.0)
        given = tuple(x.cpu() for x in self.signature.tensors(inputs))
        self.inputs = long_enough(self.model, given, self.signature)
        self.calibration = [self.inputs] if calibration is None else list(map(self.signature.tensors, calibration))
        self._int8: Int8 | None = None
        self._expected = [(tried, self._own_answer(tried)) for tried in (self.inputs, take(self.inputs, 1))]
        self._program: ExportedProgram | None = None

    @property
    def program(self) -> ExportedProgram:
        if self._program is None:
            self._program = traced(self.model, self.inputs, self.signature)
            shorter = self.signature.shorter(self.inputs)
            if shorter is not None and has_free_lengths(self._program, self.signature, self.inputs):
                self._expected.append((shorter, self._own_answer(shorter)))
        return self._program

    @own_modes()
    def write(self, path: Path, format: str) -> Exported:
        """As `export`."""
        found: list[Exported] = []

        def write(temporary: Path) -> None:
            tolerance = math.inf if format == INT8 else self.tolerance
            difference, relative = self._checked(getattr(self, f"_write_{format}")(temporary), path, tolerance)
            size, precision = temporary.stat().st_size, INT8 if format == INT8 else self.precision
            tried, how = len(self.inputs[0]), self._int8 if format == INT8 else None
            found.append(
                Exported(format, path.name, size, difference, relative, tried, RUNTIMES_OF[format], precision, how)
            )

        if is_first():
            write_atomically(path, write)
        else:  # comes to the same result, but leaves no file
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder, path.name))
        return found[0]

    def _write_onnx(self, path: Path) -> Answer:
        write_onnx(self.model, self.program, self.inputs, self.signature, path)
        return opened(path, "onnx")

    def _write_int8(self, path: Path) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "model.onnx")
            self._write_onnx(source)
            self._int8 = write_int8(source, path, self.model, self.calibration)
        return opened(path, INT8)

    def _write_pt2(self, path: Path) -> Answer:
        with path.open("wb") as file:  # with a path, torch requires its own ending
            torch.export.save(self.program, file)
        return opened(path, "pt2")

    def _write_safetensors(self, path: Path) -> Answer:
        network = on_cpu(self.model)
        for layer in tensorized_layers(network).values():
            layer.take_off_grids_()
        tensors, beside = packed(network)
        if "extra" in beside:
            message = f"{path.name} holds the tensors alone, not the extra state {', '.join(beside['extra'])}"
            warnings.warn(message, TspcWarning, stacklevel=2)
        named = tensor_state(network)
        save_file({name: value for name, value in tensors.items() if name in named}, path)
        with torch.no_grad():
            for value in tensor_state(network).values():
                value.zero_()
        own = {name: value for name, value in network.state_dict().items() if not isinstance(value, Tensor)}
        load_state(network, load_file(path) | own, str(path))
        return lambda inputs: flat(self.signature.call(network, inputs))

    @torch.no_grad()
    def _own_answer(self, inputs: Inputs) -> list[Tensor]:
        try:
            return flat(self.signature.call(self.model, inputs))
        except Exception as error:  # the network may be the user's own
            given = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
            raise ExportError(
                f"{type(self.model).__name__} cannot take inputs of shape {given}: {first_line(error)}"
            ) from error

    @torch.no_grad()
    def _checked(self, answer: Answer, path: Path, tolerance: float) -> tuple[float, float]:
        """Largest difference, absolute and relative, as a batch and alone. Raises ExportError above the tolerance."""
        difference = largest = 0.0
        refused = f"{path} was not {'replaced, the older file stays' if path.exists() else 'kept'}"
        for inputs, expected in self._expected:
            try:
                given = answer(inputs)
            except Exception as error:  # a runtime's own family
                hint = "" if self.precision == "float32" else f"; the network is in {self.precision}: try float32"
                raise ExportError(f"{refused}: it cannot be run: {first_line(error)}{hint}") from error
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, given)]
            if shapes[0] != shapes[1]:
                raise ExportError(f"{refused}: it answers with shapes {shapes[1]}, the network {shapes[0]}")
            for ours, theirs in zip(expected, given, strict=True):
                ours, theirs = ours.double(), theirs.double()
                if ours.numel():
                    difference = _larger(difference, float((ours - theirs).abs().max()))
                    largest = _larger(largest, float(ours.abs().max()))
        relative = difference / largest if largest > 0 else difference
        if not relative <= tolerance:
            raise ExportError(
                f"{refused}: its answers differ from the network's by {difference:.3g}, {relative:.3g} "
                f"of the largest, above the tolerance of {tolerance:g}; a larger tolerance allows that"
            )
        return difference, relative


def _precision(model: nn.Module) -> str:
    """The number format of most of the weights."""
    sizes: Counter[str] = Counter()
    for tensor in tensor_state(model).values():
        if tensor.is_floating_point():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _larger(a: float, b: float) -> float:
    """The larger number, or NaN if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
