"""The benchmark in several precisions: bfloat16 and int8 in OpenVINO, int8 in ONNX Runtime, all in the same turns."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import TINY
from tests.nets import Net, images, small_net
from tspc.deploy import RUNTIMES, Comparison, Graphs, calls, compare, families, timing
from tspc.deploy.runtimes import openvino_session, run_openvino
from tspc.errors import ExportError
from tspc.phases.benchmark import FOUND, benchmark_tables
from tspc.store.schemas import problem
from tspc.system import extras

RUN = (*TINY, "method=svd", "rate=0.3")
PRECISIONS = ("openvino", "openvino-bfloat16", "openvino-int8")


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    """Each graph is made when a test first needs it."""
    return Graphs({"dense": Net().eval(), "compressed": small_net("svd")}, (images(16),))


def comparison(graphs: Graphs, *runtimes: str) -> Comparison:
    return Comparison(graphs, (images(16),), runtimes, 0.0)


def test_families_keep_their_precisions_together():
    asked = ("onnx", "openvino-int8", "eager", "onnx-int8", "openvino")
    assert families(asked) == [("onnx", "onnx-int8"), ("openvino-int8", "openvino"), ("eager",)]
    assert {calls.family(name) for name in RUNTIMES} == {"eager", "compile", "onnx", "openvino"}
    assert calls.precision("openvino-bfloat16") == "bfloat16"
    assert calls.precision("onnx") == "float32"


@pytest.mark.slow
@pytest.mark.own_process
def test_precisions_are_timed_in_the_same_turns(graphs, monkeypatch):
    pytest.importorskip("openvino")
    # A clock that moves by one second a call: every time is the same, and so is the number of turns.
    now = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))
    compared = comparison(graphs, *PRECISIONS)
    for size in (1, 3):
        found = compared.at(size)
        assert [entry.runtime for entry in found] == list(PRECISIONS)
        timed = [entry for entry in found if entry.skipped is None]
        assert len(timed) >= 2, [entry.skipped for entry in found]
        assert {entry.repeats for entry in timed} == {timing.LEAST_REPEATS}
        for entry in timed:
            assert entry.against == {side: {"float32": 1.0, "int8": 1.0} for side in ("dense", "compressed")}


@pytest.mark.slow
def test_int8_alone_is_compared_with_float32_too(graphs):
    (found,) = comparison(graphs, "onnx-int8").at(2)
    assert found.against is not None
    assert found.speedup == found.against["compressed"]["int8"]
    assert found.against["compressed"]["float32"] > 0
    assert found.against["dense"]["int8"] == 1.0
    (plain,) = comparison(graphs, "onnx").at(2)
    assert plain.against is None


@pytest.mark.slow
@pytest.mark.own_process
def test_openvino_answers_as_the_network_in_every_precision(graphs, monkeypatch):
    openvino = pytest.importorskip("openvino")
    small, batch = graphs.networks["compressed"], images(16)
    with torch.no_grad():
        wanted = small(batch)
    is_short = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    bounds = {"float32": 1e-5, "int8": 0.1} | ({"bfloat16": 0.05} if is_short else {})
    for precision, bound in bounds.items():
        request = openvino_session(graphs.graph("compressed", precision), (batch,), precision, 1)
        (given,) = run_openvino(request, (batch,))
        assert (given - wanted).norm() <= bound * wanted.norm(), precision
    monkeypatch.setattr(openvino.Core, "get_property", lambda *args: ["FP32"])
    with pytest.raises(ExportError, match="^this processor has no bfloat16, so OpenVINO would compute in float32$"):
        openvino_session(graphs.graph("compressed", "float32"), (batch,), "bfloat16", 1)


@pytest.mark.slow
@pytest.mark.own_process
def test_what_openvino_refuses_is_one_line(monkeypatch):
    pytest.importorskip("openvino")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    graphs = Graphs({"small": model}, (torch.zeros(2, 3),))
    for graph in (b"no graph", graphs.graph("small", "float32")):
        batch = torch.zeros(2, 3 if graph == b"no graph" else 5)
        with pytest.raises(ExportError, match="^OpenVINO does not take the network: ") as caught:
            openvino_session(graph, (batch,), "float32", 1)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Graphs, "graph", lambda *args: b"no graph")
    found = compare(model, model, (torch.zeros(2, 3),), 2, "openvino", 0.0)
    assert str(found.skipped).startswith("OpenVINO does not take the network: ")


@pytest.mark.slow
def test_a_run_is_measured_in_int8(cli, tmp_path):
    runtimes = "phase.benchmark.runtimes=[eager,onnx,onnx-int8]"
    options = (runtimes, "phase.benchmark.seconds=0", "phase.benchmark.batch_sizes=[2]")
    code, out, err = cli(*RUN, "phase=[pretrain,decompose,benchmark]", *options)
    assert (code, err) == (0, "")
    assert "Times as fast as the dense network, in the same turns" in out
    run = tmp_path / "outputs/synthetic/resnet8/svd-0.3/seed0"
    found = json.loads((run / "result.json").read_text())["benchmark"]
    assert problem(found, FOUND) is None
    assert [entry["runtime"] for entry in found["timings"]] == ["eager", "onnx", "onnx-int8"]
    assert len(benchmark_tables(found)) == 3
    # An earlier version timed each runtime alone.
    for entry in found["timings"]:
        del entry["against"]
    assert problem(found, FOUND) is None
    assert len(benchmark_tables(found)) == 2


@pytest.mark.parametrize(
    ("absent", "runtime", "extra"), [("openvino", "openvino-int8", "openvino"), ("onnxruntime", "onnx-int8", "onnx")]
)
def test_a_runtime_that_is_asked_for_but_not_installed_is_refused(cli, monkeypatch, tmp_path, absent, runtime, extra):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == absent else find_spec(name))
    code, _, err = cli(*RUN, "phase=[pretrain,decompose,benchmark]", f"phase.benchmark.runtimes=[eager,{runtime}]")
    assert code == 1
    assert err == (
        f"tspc: the runtime {runtime} (phase.benchmark.runtimes) needs the extra {extra}; "
        f"{absent} not installed: pip install 'tspc[{extra}]'\n"
    )
    assert not Path(tmp_path / "outputs").exists()
