"""Exported files of networks in few bits: as small as their integers, and computed with the same numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import tspc
from tspc.compression.integers import state_bytes
from tspc.deploy.exporting import Exporter
from tspc.deploy.onnx_programs import onnx_program
from tspc.layers.forms import tensorized_layers

IMAGES = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 101, (3, 7), generator=torch.Generator().manual_seed(0))


def convolutions() -> nn.Module:
    """Batch norms with signs, which are folded into kernels; groups; odd numbers of entries."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 27, 3, padding=1, bias=False), nn.BatchNorm2d(27), nn.ReLU()),
        *(nn.Conv2d(27, 33, 3, bias=False), nn.BatchNorm2d(33), nn.ReLU()),
        *(nn.Conv2d(33, 33, 3, groups=3), nn.ConvTranspose2d(33, 31, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(31, 51)),
    )
    for norm in (model[1], model[4]):
        norm.weight.data = torch.randn(norm.num_features)
        norm.running_var.data = torch.rand(norm.num_features) + 0.5
    return model.eval()


class Text(nn.Module):
    """A table, and an output layer that shares it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner, self.head = nn.Embedding(101, 24), nn.Linear(24, 24), nn.Linear(24, 101)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.inner(self.table(tokens)).relu())


def kinds(path) -> dict[str, list[int]]:
    """The number format of each constant of a file, and how many entries it has."""
    found: dict[str, list[int]] = {}
    for constant in onnx.load(path).graph.initializer:
        found.setdefault(onnx.TensorProto.DataType.Name(constant.data_type), []).append(int(np.prod(constant.dims)))
    return found


@pytest.mark.parametrize("bits", ["16", "8", "6", "5", "4", "3"])
@pytest.mark.parametrize(("build", "inputs"), [(convolutions, IMAGES), (Text, TOKENS)], ids=["convolutions", "text"])
def test_a_file_is_as_small_as_the_network(tmp_path, build, inputs, bits):
    model = build().eval()
    small = tspc.compress(model, "dense", size=0.99, bits=bits)
    assert {layer.bits for layer in tensorized_layers(small).values()} == {int(bits)}
    done = Exporter(small, inputs, 1e-6).write(tmp_path / "small.onnx", "onnx")
    dense = Exporter(model, inputs, 1e-5).write(tmp_path / "dense.onnx", "onnx")
    graph = dense.bytes - 4 * sum(p.numel() for p in model.parameters())
    assert done.bytes <= state_bytes(small) + 2 * graph + 12_000  # with the nodes that compute the numbers
    assert sum(kinds(tmp_path / "small.onnx")["FLOAT"]) < 0.1 * sum(kinds(tmp_path / "dense.onnx")["FLOAT"])


@pytest.mark.parametrize("method", ["svd", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_permuted_kernels_and_other_number_formats(tmp_path, method, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.ConvTranspose2d(4, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.ConvTranspose2d(24, 40, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 30)),
    )
    model = model.eval().to(dtype)
    small = tspc.compress(model, method, bits="4", **({"rate": 0.5} if method == "svd" else {"size": 0.99})).eval()
    sides = {}
    for name, network in (("dense", model), ("small", small)):
        exporter = Exporter(network, IMAGES.to(dtype), 1e-4)
        made = onnx_program(exporter.program, exporter.inputs, exporter.signature, exporter.model)
        made.save(str(tmp_path / f"{name}.onnx"), external_data=False)
        sides[name] = kinds(tmp_path / f"{name}.onnx")
        if dtype == torch.float32:  # which the runtime knows
            assert exporter.write(tmp_path / "tried.onnx", "onnx").relative < 1e-5
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    left = {kind: sum(counts) for kind, counts in sides["small"].items() if kind in ("FLOAT", "FLOAT16", "DOUBLE")}
    assert sum(left.values()) < 0.2 * sum(map(sum, sides["dense"].values()))


def test_a_runtime_computes_the_numbers_once(tmp_path):
    for name, build, inputs in (("images", convolutions, IMAGES), ("text", Text, TOKENS)):
        model = build().eval()
        small = tspc.compress(model, "dense", size=0.99, bits="4")
        found = []
        for label, network in (("dense", model), ("small", small)):
            path, options = tmp_path / f"{name}-{label}.onnx", onnxruntime.SessionOptions()
            Exporter(network, inputs, 1e-5).write(path, "onnx")
            options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "ready.onnx"), 3
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            onnxruntime.InferenceSession(path, options)
            found.append(Counter(node.op_type for node in onnx.load(tmp_path / "ready.onnx").graph.node))
        assert found[0] == found[1]


@pytest.mark.own_process
def test_openvino_reads_the_same_numbers(tmp_path):
    import openvino

    model, counts = convolutions(), []
    for bits in ("32", "8", "5"):
        small = model if bits == "32" else tspc.compress(model, "dense", size=0.99, bits=bits).eval()
        Exporter(small, IMAGES, 1e-5).write(tmp_path / "small.onnx", "onnx")
        compiled = openvino.Core().compile_model(tmp_path / "small.onnx", "CPU")
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(compiled(IMAGES.numpy())[0]), small(IMAGES))
        found = (node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops())
        counts.append(Counter(kind for kind in found if kind != "Const"))
    assert counts[0] == counts[1] == counts[2]


def test_other_constants_stay(tmp_path):
    small = tspc.compress(convolutions(), "svd", rate=0.5).eval()
    done = Exporter(small, IMAGES, 1e-5).write(tmp_path / "small.onnx", "onnx")
    assert set(kinds(tmp_path / "small.onnx")) == {"FLOAT", "INT64"}
    assert done.bytes > state_bytes(small)
