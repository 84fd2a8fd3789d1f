"""The dense and the compressed network as ONNX graphs in several precisions; each is made when it is first needed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from tspc.deploy.exporting import INT8
from tspc.deploy.int8 import Int8, write_int8
from tspc.deploy.onnx_programs import write_onnx
from tspc.deploy.programs import on_cpu, traced
from tspc.deploy.signature import Call, Inputs, Signature
from tspc.errors import ExportError


class Graphs:
    """ONNX graphs of `networks`, as the bytes of a file. They take any batch size, so each network is traced once.

    `calibration` reads batches of inputs, which show the ranges of activations in int8; by default they are `inputs`.
    `int8` says how each graph of 8-bit integers was made.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        inputs: Call,
        calibration: Callable[[], Sequence[Call]] | None = None,
    ) -> None:
        self.networks, self.signature = networks, Signature.of(next(iter(networks.values())), inputs)
        self._inputs = tuple(x.cpu() for x in self.signature.tensors(inputs))
        self._read = calibration or (lambda: [self._inputs])
        self.int8: dict[str, Int8] = {}
        self._made: dict[tuple[str, bool], bytes | ExportError] = {}

    def graph(self, side: str, precision: str) -> bytes:
        """The graph of the network named `side`; for int8 with 8-bit integers, else in its own precision.

        Raises ExportError if the network cannot be written so.
        """
        key = side, precision == INT8
        if key not in self._made:
            try:
                self._made[key] = self._int8(side) if precision == INT8 else self._plain(side)
            except ExportError as error:
                self._made[key] = error
        found = self._made[key]
        if isinstance(found, ExportError):
            raise found
        return found

    def put(self, side: str, graph: bytes) -> None:
        """Takes a graph of the network named `side`, in its own precision, in the place of an export."""
        self._made[side, False] = graph

    @cached_property
    def _calibration(self) -> list[Inputs]:
        return [self.signature.tensors(batch) for batch in self._read()]

    def _plain(self, side: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            network = on_cpu(self.networks[side])
            program = traced(network, self._inputs, self.signature)
            write_onnx(network, program, self._inputs, self.signature, path)
            return path.read_bytes()

    @torch.no_grad()
    def _int8(self, side: str) -> bytes:
        plain = self.graph(side, "float32")
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "model.onnx"), Path(folder, "model.int8.onnx")
            source.write_bytes(plain)
            self.int8[side] = write_int8(source, target, self.networks[side], self._calibration)
            return target.read_bytes()
