"""The times of single layers, their graphs and table, and an allocation under a time; no test looks at a real clock."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.nets import Net, images
from tspc.compression import layer_times
from tspc.compression.allocation import candidate
from tspc.compression.curves import error_curves
from tspc.compression.layer_times import SHARES, LayerTimes, Place, cache_folder
from tspc.compression.network_times import with_random_factors
from tspc.compression.outline import outline
from tspc.compression.path_costs import macs_of
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.compression.timed import Allocation, Option, options_of
from tspc.decompositions import METHODS
from tspc.deploy.grafting import grafted
from tspc.deploy.graphs import Graphs
from tspc.deploy.layer_graphs import graph_of, operations, seconds_of
from tspc.layers.chains import CHAIN, REBUILT, contracted, paths_of, stages_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import kernel_of, kernel_shape

ALL = {"keep_first": False, "keep_last": False}


def fake_clock(form, stages, size):
    """Seconds of a layer: its multiply-adds, and its calls."""
    return 1e-9 * macs_of(form, list(stages), size) + 1e-6 * len(stages)


LAYERS = {
    "strided": (nn.Conv2d(12, 16, 3, stride=2, padding=(1, 0)), (9, 8)),
    "dilated": (nn.Conv2d(12, 16, (3, 5), padding="same", dilation=2), (9, 8)),
    "grouped": (nn.Conv2d(12, 16, 3, groups=2), (9, 8)),
    "line": (nn.Conv1d(12, 16, 3, padding=1, stride=2), (1, 11)),
    "dense": (nn.Linear(12, 16), (3, 1)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["svd", "tk", "tt"])
def test_the_graph_of_a_layer_computes_what_the_layer_computes(kind, method):
    layer, size = LAYERS[kind]
    form, shape, made = Form.of(layer), kernel_shape(layer), METHODS[method]().for_shape(kernel_shape(layer))
    rank = made.rank_for(shape, layer.weight.numel() // 2)
    factors = made.decompose(kernel_of(layer).detach(), rank)
    x = torch.randn({"line": (2, 12, 11), "dense": (2, 3, 12)}.get(kind, (2, 12, *size)))
    for path in paths_of(made, shape, rank, form.groups):
        parts = operations(form, stages_of(made, shape, rank, path, form.groups))
        kernels = contracted(made, factors, path)
        wanted = x
        for stage, kernel in zip(stages_of(made, shape, rank, path, form.groups), kernels, strict=True):
            wanted = form.run(stage, wanted, form.ready(kernel, stage), None)
        given = [kernel.reshape(part.shape).numpy() for part, kernel in zip(parts, kernels, strict=True)]
        graph = graph_of(parts, x.shape, given, marked=False)
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_has_a_time_in_the_runtime():
    for layer, size in LAYERS.values():
        form = Form.of(layer)
        parts = operations(form, stages_of(METHODS["svd"](), kernel_shape(layer), (), REBUILT, form.groups))
        own = {"conv2d": size, "conv1d": size[1:]}.get(form.kind, size[:1])
        assert 0 < seconds_of(parts, 2, own, "onnx", 1) < 1
        assert 0 < layer_times.clock_of(Place("eager", 2))(form, stages_of(METHODS["svd"](), *_whole(layer)), size) < 1


def _whole(layer):
    return kernel_shape(layer), (), REBUILT, Form.of(layer).groups


def test_a_grafted_graph_is_that_of_the_network_with_the_layers():
    model = Net().eval()
    made = plan(model, "svd", 0.3, allocation="uniform", **ALL)
    rows = [replace(row, path=CHAIN) for row in made.tensorized]
    assert {row.kind for row in rows} == {"Conv2d", "Linear"}
    parts = {
        row.name: operations(
            Form.of(model.get_submodule(row.name)), stages_of(row.method, row.shape, row.rank, row.path)
        )
        for row in rows
    }
    inputs = (images(2),)
    graphs = Graphs({"dense": model, "small": with_random_factors(model, rows)}, inputs)
    found = grafted(graphs.graph("dense", "float32"), model, parts)
    assert found is not None
    shapes = []
    for graph in (found, graphs.graph("small", "float32")):
        loaded = onnx.load_from_string(graph)
        known = {tensor.name: tuple(tensor.dims) for tensor in loaded.graph.initializer}
        used = [node for node in loaded.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
        shapes.append([sorted(known[node.input[1]]) for node in used])
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        answer = session.run(None, {session.get_inputs()[0].name: inputs[0].numpy()})[0]
        assert answer.shape == (2, 5)
        assert np.isfinite(answer).all()
    assert shapes[0] == shapes[1]
    assert grafted(graphs.graph("dense", "float32"), model, {}) is not None
    model.wide.padding_mode = "circular"
    assert grafted(graphs.graph("dense", "float32"), model, parts) is None


def random_options(rng, layers=4, count=5):
    found = []
    for _ in range(layers):
        times, sizes = sorted(rng.uniform(1, 9, count))[::-1], sorted(rng.integers(10, 99, count))[::-1]
        errors = [0.0, *sorted(rng.uniform(0.01, 1, count - 1))]
        found.append(
            [Option((i, t), e, t, int(s)) for i, (e, t, s) in enumerate(zip(errors, times, sizes, strict=True))]
        )
    return found


def test_the_allocation_is_nearly_the_best_of_all():
    rng, gaps = np.random.default_rng(0), []
    for _ in range(60):
        options = random_options(rng)
        choices = Allocation(options)
        dense, least = choices.dense_seconds, choices.fastest()
        assert least == pytest.approx(sum(min(x.seconds for x in row) for row in options))
        seconds = least + rng.uniform(0.1, 0.9) * (dense - least)
        sizes = sum(row[0].size for row in options), sum(min(x.size for x in row) for row in options)
        size = rng.choice([math.inf, sizes[1] + rng.uniform(0.3, 0.9) * (sizes[0] - sizes[1])])
        every = [
            sum(x.error for x in each)
            for each in itertools.product(*options)
            if sum(x.seconds for x in each) <= seconds and sum(x.size for x in each) <= size
        ]
        found = choices.at(seconds, size)
        if not every:
            assert found is None
            continue
        assert found is not None
        assert sum(x.seconds for x in found) <= seconds * (1 + 1e-6)
        assert sum(x.size for x in found) <= size
        gaps.append(sum(x.error for x in found) / min(every))
    assert np.median(gaps) < 1.01
    assert max(gaps) < 2


def test_what_cannot_be_had_is_none():
    choices = Allocation(random_options(np.random.default_rng(1)))
    assert choices.at(0.99 * choices.fastest()) is None
    assert choices.at(1e9, 1) is None
    assert choices.fastest(1) == math.inf
    assert [x.error for x in choices.at(1e9)] == [0.0] * 4


@pytest.mark.parametrize("bits", ["32", "8"])
def test_no_option_is_slower_than_the_dense_layer(bits):
    unit = "bytes" if bits == "8" else "parameters"
    model, asked = Net(), PlanSettings.of("tk", 0.5, bits=bits, rate_unit=unit, **ALL)
    sketch = outline(model, asked)
    curves = error_curves(model, sketch.layers, asked.method, None, widths=asked.widths)
    for row in sketch.chosen:
        one = candidate(row, asked.method, curves, 1, asked.widths)
        assert one is not None
        slow = lambda row: 2.0 if row.rank and row.params > 0.6 * row.dense_params else 1.0  # noqa: E731
        found = options_of(one, slow, lambda row: row)
        assert found[0].row.method is None
        assert all(x.seconds <= 1.0 and x.size < one.dense_size for x in found[1:])
        assert all(x.row.params <= 0.6 * x.row.dense_params for x in found[1:] if x.row.rank)
        assert all(x.row.bits == int(bits) for x in found[1:])
        assert any(x.row.rank == () for x in found) == (bits == "8")


def layer_seconds(times, share=0.5):
    layer = nn.Conv2d(32, 32, 3, padding=1)
    method = METHODS["svd"]()
    rank = method.rank_for(kernel_shape(layer), int(share * layer.weight.numel()))
    return times.seconds(Form.of(layer), kernel_shape(layer), (8, 8), method, rank, CHAIN)


def test_a_table_measures_each_shape_once_and_keeps_it(tmp_path):
    asked = []

    def clock(form, stages, size):
        asked.append(stages)
        return 3e-6 * len(asked)

    times = LayerTimes(Place("onnx"), clock, tmp_path)
    first = [layer_seconds(times, share) for share in (0.05, 0.5, 0.9)]
    assert len(asked) == len(SHARES)
    assert first == sorted(first)
    times.keep()
    again = LayerTimes(Place("onnx"), clock, tmp_path)
    assert [layer_seconds(again, share) for share in (0.05, 0.5, 0.9)] == first
    assert len(asked) == len(SHARES)
    assert again.path != LayerTimes(Place("onnx", 2), clock, tmp_path).path
    assert again.path != LayerTimes(Place("onnx", 1, 2), clock, tmp_path).path
    assert again.path != LayerTimes(Place("openvino"), clock, tmp_path).path
    # 8 bits share the measured times of float32, but not the costs.
    narrow = LayerTimes(Place("onnx-int8"), clock, tmp_path)
    assert narrow.path == again.path
    assert layer_seconds(narrow) != layer_seconds(again)
    assert len(asked) == len(SHARES)


@pytest.mark.parametrize("damage", ["", "{", '{"seconds": {}}', "other machine"])
def test_a_damaged_table_is_made_again(tmp_path, damage):
    times = LayerTimes(Place("onnx"), fake_clock, tmp_path)
    found = layer_seconds(times)
    times.keep()
    assert times.path is not None
    text = times.path.read_text()
    machine = times.place.identity()["machine"]
    times.path.write_text(text.replace(str(machine), "other") if damage == "other machine" else damage)
    again = LayerTimes(Place("onnx"), fake_clock, tmp_path)
    assert layer_seconds(again) == found
    again.keep()
    assert times.path.read_text() == text


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    times = LayerTimes(Place("onnx"), fake_clock, tmp_path / "file" / "below")
    assert layer_seconds(times) > 0
    times.keep()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tspc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tspc"
