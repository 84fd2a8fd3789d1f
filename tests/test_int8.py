"""ONNX files of 8-bit integers run in two runtimes, answer nearly as the network, and hold the network's integers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

import tspc
from tests.conftest import TINY, Once
from tests.small import SPEC, network, save_trained
from tspc.data import load_data
from tspc.deploy import export, exporting
from tspc.deploy.runtimes import opened, openvino_session, run_openvino
from tspc.errors import ExportError
from tspc.layers.forms import tensorized_layers
from tspc.phases import export as phase
from tspc.phases.export import FOUND, Export, export_files
from tspc.phases.inputs import Example
from tspc.store.schemas import problem

CPU = torch.device("cpu")
RUN = (*TINY, "method=svd", "rate=0.3")


def images(count: int = 100) -> torch.Tensor:
    return next(iter(load_data(SPEC).calibration_batches(count, count, CPU))).contiguous()


def integers(path: Path) -> list[np.ndarray]:
    """The weights of an int8 file, without those of biases and zero points."""
    tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim > 1]


@pytest.fixture(scope="module", params=[8, 4])
def made(request, once: Once) -> tuple[nn.Module, Path, exporting.Exported]:
    """A trained network in few bits, and its file."""

    def make(folder: Path) -> None:
        model = network()
        model.load_state_dict(load_file(once("reference", save_trained) / "model.safetensors"))
        small = tspc.compress(model, "svd", 0.6, bits=request.param, calibration=images()).eval()
        done = export(small, folder / "net.int8.onnx", images(4), calibration=images(64).split(32))
        torch.save((small, done), folder / "made.pt")

    folder = once(f"int8-{request.param}", make)
    small, done = torch.load(folder / "made.pt", weights_only=False)
    return small, folder / "net.int8.onnx", done


@pytest.mark.slow
@pytest.mark.own_process
def test_both_runtimes_answer_nearly_as_the_network(made):
    small, path, done = made
    batch = images()
    with torch.no_grad():
        wanted = small(batch)
    assert (done.format, done.precision, done.runtime) == ("int8", "int8", "ONNX Runtime")
    (given,) = opened(path, "int8")((batch,))
    assert 0 < (given - wanted).norm() < 0.05 * wanted.norm()
    assert (given.argmax(1) == wanted.argmax(1)).float().mean() >= 0.95
    (given,) = run_openvino(openvino_session(path, (batch,), "float32", 1), (batch,))
    if torch.cpu._is_vnni_supported():
        assert 0 < (given - wanted).norm() < 0.05 * wanted.norm()
        assert (given.argmax(1) == wanted.argmax(1)).float().mean() >= 0.95
    else:  # OpenVINO adds 8-bit products in 16 bits, which overflow
        assert 0 < (given - wanted).norm() < 0.5 * wanted.norm()


def test_weights_lie_on_the_grids_of_the_network(made):
    small, path, done = made
    found = integers(path)
    expected = [
        grid.integers(factor.detach()).flatten(1).numpy()
        for layer in tensorized_layers(small).values()
        if layer.path == "chain" or len(layer.grids) == 1
        for factor, grid in zip(layer.factor_tensors(), layer.grids, strict=True)
    ]
    assert done.int8 is not None
    layers = tensorized_layers(small).values()
    new = sum(len(layer.stages) for layer in layers if layer.path != "chain" and len(layer.grids) > 1)
    assert done.int8.on_grids + new == done.int8.weights == len(found), "merged links have a new kernel"

    def is_there(rows: np.ndarray) -> bool:
        # A batch norm that is folded into a weight may turn the sign of a row.
        others = [other.reshape(len(other), -1) for other in found]
        pairs = [zip(rows, other, strict=True) for other in others if other.shape == rows.shape]
        return any(all((a == b).all() or (a == -b).all() for a, b in pair) for pair in pairs)

    # The first and the last layer stay in float32 where that is nearer to the network.
    assert sum(map(is_there, expected)) == len(expected) - len(done.int8.float_layers) > 5


def test_the_file_is_smaller_than_the_dense_one(made, tmp_path):
    _, path, _ = made
    assert path.stat().st_size < 0.5 * export(network(), tmp_path / "net.onnx", images(4)).bytes


class Uneven(nn.Module):
    """Its answer depends on an input channel that 8 bits for all channels together do not see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 8, 3)
        self.middle = nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 5)
        with torch.no_grad():
            self.first.weight[:, 0] = 0
            self.first.weight[:, 1] *= 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x).relu()).relu().mean((2, 3)))


def test_the_first_and_the_last_layer_stay_in_float32_where_that_is_better(tmp_path):
    x = torch.randn(64, 2, 10, 10) * torch.tensor([100.0, 0.001]).view(2, 1, 1)
    model = Uneven()
    with torch.no_grad():
        model.last.bias -= model(x).mean(0)  # so that the images have several classes
        assert len(model(x).argmax(1).unique()) > 2
    done = export(model, tmp_path / "net.int8.onnx", x)
    assert done.int8 == exporting.Int8(("first", "last"), 1, 0)
    assert done.relative < 0.1


def test_a_linear_network_of_sequences(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16))
    x = torch.randn(64, 5, 24)
    small = tspc.compress(model, "dense", bits=8, calibration=x, keep_first=False, keep_last=False).eval()
    done = export(small, tmp_path / "net.int8.onnx", x)
    assert done.int8 is not None
    assert done.int8.weights == done.int8.on_grids == 2
    assert done.relative < 0.05


def test_a_channel_whose_bias_needs_a_larger_scale_is_not_counted(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5))
    with torch.no_grad():
        model[0].weight[0] *= 1e-12
        model[0].bias[0] = 1.0
    x = torch.randn(32, 3, 8, 8)
    small = tspc.compress(model, "dense", bits=8, calibration=x, keep_first=False, keep_last=False).eval()
    done = export(small, tmp_path / "net.int8.onnx", x)
    assert done.int8 == exporting.Int8((), 2, 1)
    assert done.relative < 0.05, "the bias counts, the tiny weights do not"


def test_a_network_that_the_quantizer_does_not_take_is_one_line(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", lambda *args, **options: refuse())
    with pytest.raises(ExportError, match="^ONNX Runtime cannot quantise the network: ValueError: no$"):
        export(nn.Linear(3, 2), tmp_path / "net.int8.onnx", torch.randn(2, 3))
    monkeypatch.undo()
    for model, x in ((nn.ReLU(), torch.randn(2, 3)), (nn.Linear(3, 2).double(), torch.randn(2, 3).double())):
        with pytest.raises(ExportError, match="^ONNX Runtime can quantise no layer of the network; export it to onnx"):
            export(model, tmp_path / "net.int8.onnx", x)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed(tmp_path, capfd):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(80, 3))
    done = export(model, tmp_path / "net.int8.onnx", torch.randn(16, 5, 16))
    assert done.int8 is not None
    assert done.int8.weights >= 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_result_tells_what_each_file_is_and_reaches(cli, tmp_path):
    formats = "phase.export.formats=[onnx,int8,pt2,safetensors]"
    limit = "phase.export.eval_samples=60"
    code, out, err = cli(*RUN, "phase=[pretrain,decompose,export]", formats, limit, "report=true")
    assert (code, err) == (0, "")
    run = tmp_path / "outputs/synthetic/resnet8/svd-0.3/seed0"
    found = json.loads((run / "result.json").read_text())["export"]
    assert found["accuracy"]["images"] == 60
    told = {file["file"]: (file["runtime"], file["precision"]) for file in found["files"]}
    assert told == {
        "model.onnx": ("ONNX Runtime", "float32"),
        "model.int8.onnx": ("ONNX Runtime", "int8"),
        "model.pt2": ("torch.export", "float32"),
        "model.safetensors": (None, "float32"),
    }
    accuracies = {file["file"]: file["accuracy"] for file in found["files"]}
    assert accuracies["model.onnx"] == accuracies["model.pt2"] == found["accuracy"]
    assert accuracies["model.int8.onnx"]["images"] == 60
    assert accuracies["model.safetensors"] is None
    assert all((run / "export" / file["file"]).stat().st_size == file["bytes"] for file in found["files"])
    assert "in ONNX Runtime" in out
    assert problem(found, FOUND) is None
    page = (run / "report.html").read_text()
    assert "model.int8.onnx" in page
    assert f"{100 * found['accuracy']['top1']:.2f} %" in page

    # What an earlier version found has none of this, and is still right.
    record = json.loads((run / "export.json").read_text())
    for key in ("runtime", "precision", "accuracy", "int8"):
        for file in record["found"]["files"]:
            file.pop(key, None)
    del record["found"]["accuracy"]
    for key in ("calibration", "accuracy_tolerance"):
        del record["settings"][key]
    (run / "export.json").write_text(json.dumps(record))
    code, out, err = cli(*RUN, "phase=export", formats, limit, "report=true")
    assert (code, err) == (0, "")
    assert "done before" in out
    assert "Exported files" not in (run / "report.html").read_text()
    assert json.loads((run / "result.json").read_text())["export"] == record["found"]


def test_a_file_that_loses_accuracy_is_named(reference, context, tmp_path, monkeypatch, capsys):
    real = phase.opened
    monkeypatch.setattr(phase, "opened", lambda *args: lambda inputs: [-real(*args)(inputs)[0]])
    example = Example((images(4),), "training images")
    found = export_files(reference.eval(), Export(("pt2",), eval_samples=50), example, lambda: [], tmp_path, context)
    assert found["files"][0]["accuracy"]["top1"] < found["accuracy"]["top1"] - 0.01
    text = " ".join(capsys.readouterr().out.split())
    assert "model.pt2 loses" in text
    assert "on 50 test images; phase.export.accuracy_tolerance=0.01 allows 1" in text
