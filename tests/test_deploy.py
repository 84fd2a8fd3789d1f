"""Exported files answer like the network and need nothing of this package; costs are counted, not guessed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tspc
from tests.conftest import Once
from tests.nets import Net, small_net
from tests.small import network
from tspc.compression.compress import compress
from tspc.deploy import FORMATS, Comparison, Exporter, Graphs, compare, cost, export, exporting, graphs, runtimes
from tspc.errors import ConfigError, ExportError
from tspc.system import extras

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

READERS = {
    "onnx": "import onnxruntime; session = onnxruntime.InferenceSession(path)\n"
    "answers += [torch.from_numpy(session.run(None, {'input': images.numpy()})[0])]",
    "pt2": "answers += [torch.export.load(path).module()(images)]",
}


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return compress(network(), "rtk", 0.3, allocation="uniform").eval()


@pytest.fixture(scope="module")
def exported(small: nn.Module, once: Once) -> dict[str, Path]:
    def make(folder: Path) -> None:
        exporter = Exporter(small, IMAGES, 1e-5)
        for format in FORMATS:
            done = exporter.write(folder / f"net.{format}", format)
            assert (done.format, done.file, done.samples) == (format, f"net.{format}", 3)
            assert done.bytes == (folder / done.file).stat().st_size
            assert 0 <= done.relative <= 1e-5
        assert len(list(folder.iterdir())) == len(FORMATS), "nothing else is left"

    folder = once("exported", make)
    return {format: folder / f"net.{format}" for format in FORMATS}


@pytest.mark.slow
def test_a_file_needs_no_tspc_and_takes_any_batch_size(small, exported, tmp_path):
    images = torch.cat([IMAGES, IMAGES])
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; sys.modules['tspc'] = None\n"
        f"answers, images = [], torch.load({str(tmp_path / 'images.pt')!r})\n"
        + "".join(f"path = {str(exported[format])!r}\n{reader}\n" for format, reader in READERS.items())
        + f"torch.save(answers, {str(tmp_path / 'answers.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = torch.load(tmp_path / "answers.pt")
    assert len(answers) == len(READERS)
    for answer in answers:
        with torch.no_grad():
            torch.testing.assert_close(answer.detach(), small(images), rtol=1e-4, atol=1e-5)


def test_files_hold_factors_and_neither_images_nor_paths(small, exported):
    weights = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert exported["onnx"].stat().st_size < weights + 60_000, "kernels were not multiplied out"
    assert load_file(exported["safetensors"]).keys() == small.state_dict().keys()
    archive = zipfile.ZipFile(exported["pt2"])
    content = [exported["onnx"].read_bytes(), *(archive.read(name) for name in archive.namelist())]
    for data in content:
        assert IMAGES[0].numpy().tobytes() not in data
        assert __file__.encode() not in data
        assert b"layers.py" not in data


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, format, monkeypatch):
    path = tmp_path / f"net.{format}"
    path.write_text("older")
    # What is read back is another network's answer.
    name = "run_session" if format == "onnx" else "flat"
    where = exporting if format == "safetensors" else runtimes
    real = getattr(where, name)
    calls = iter(range(100))
    wrong = lambda *args: [t + (0.01 if where is runtimes or next(calls) > 1 else 0) for t in real(*args)]  # noqa: E731
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(ExportError, match=r"was not replaced, the older file stays: its answers differ .* by 0\.01"):
        export(small_net("rtk"), path, IMAGES)
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_network_is_left_as_it_was(tmp_path):
    model = network().train().to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "net.safetensors", IMAGES)
    assert model.training
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_may_differ_by_its_roundings(tmp_path):
    model = network().half()
    assert export(model, tmp_path / "half.pt2", IMAGES.half()).relative < 2e-3
    with pytest.raises(ExportError, match="above the tolerance of 1e-12; a larger tolerance allows that"):
        export(network(), tmp_path / "net.onnx", IMAGES, tolerance=1e-12)


class Two(nn.Module):
    """Two inputs, a tuple of answers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(self, x, y):
        z = self.left(x) + self.right(y)
        return z.relu(), {"norm": z.norm(dim=1)}


def test_several_inputs_and_answers(tmp_path):
    inputs = torch.randn(3, 4), torch.randn(3, 6)
    for format in FORMATS:
        assert export(Two(), tmp_path / f"two.{format}", inputs).relative < 1e-5


class Fickle(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


class Gathering(nn.Module):
    """Takes `*inputs`, like DataParallel and other wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, first, *others):
        return self.layer(first) + sum(self.layer(other) for other in others)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_forward_that_gathers_its_inputs(tmp_path, format):
    inputs = tuple(torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert export(Gathering(), tmp_path / f"net.{format}", inputs).relative < 1e-5


def test_a_network_that_cannot_be_traced_is_told_in_one_line(tmp_path, capfd):
    with pytest.raises(ExportError, match=r"^Fickle cannot be traced by torch.export: .+$"):
        export(Fickle(), tmp_path / "net.pt2", IMAGES)
    with pytest.raises(ExportError, match="cannot export as 'tflite'; choose one of onnx, pt2, safetensors"):
        export(Fickle(), tmp_path / "net.tflite", IMAGES)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", ""), "nothing beside the error"


def test_inputs_that_do_not_fit_are_named(small, tmp_path):
    for format in FORMATS:
        message = r"cannot take inputs of shape \(2, 5, 16, 16\) float32: RuntimeError: "
        with pytest.raises(ExportError, match=message):
            export(small, tmp_path / f"net.{format}", torch.randn(2, 5, 16, 16))
    assert list(tmp_path.iterdir()) == []


def test_what_a_runtime_refuses_is_one_line(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).bfloat16()
    with pytest.raises(ExportError, match="^ONNX Runtime does not take the network: ") as caught:
        export(model, tmp_path / "net.onnx", IMAGES.bfloat16())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    found = compare(model, model, (IMAGES.bfloat16(),), 2, "onnx", 0.0)
    assert found.dense is None
    assert str(found.skipped).startswith("ONNX Runtime does not take the network: ")


def test_of_several_processes_one_keeps_the_file(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    other = export(small, tmp_path / "net.safetensors", IMAGES)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    assert export(small, tmp_path / "net.safetensors", IMAGES) == other
    assert (tmp_path / "net.safetensors").stat().st_size == other.bytes


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_a_missing_extra_is_one_line_with_the_remedy(extra, monkeypatch):
    extras.require(extra, "this")
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in extras.EXTRAS[extra] else find_spec(name))
    with pytest.raises(ConfigError, match=rf"^this needs the extra {extra}; .* pip install 'tspc\[{extra}\]'$"):
        extras.require(extra, "this")


def test_costs_are_those_of_the_arithmetic():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    found = cost(model, (torch.randn(4, 3, 6, 6),))
    assert found.macs == 8 * 3 * 9 * 36 + 8 * 36 * 5
    assert found.parameters == 8 * 3 * 9 + 8 + 8 * 36 * 5 + 5
    assert found.weight_bytes == 4 * found.parameters
    # At the peak the convolution's answer and its ReLU are there.
    assert found.peak_bytes == found.weight_bytes + 2 * 4 * (4 * 8 * 36)


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    length, width, hidden = 10, 16, 32
    projections = length * (4 * width * width + 2 * width * hidden)
    assert cost(layer, (torch.randn(3, length, width),)).macs == projections + 2 * length * length * width


def test_both_networks_are_timed_by_turns(small):
    found = compare(network(), small, (IMAGES,), 5, "eager", 0.05)
    assert found.repeats >= 5
    for side in (found.dense, found.compressed):
        assert side is not None
        assert 0 < side["median"] <= side["p95"]
        assert side["throughput"] == pytest.approx(5 / side["median"])
    assert found.speedup is not None


@pytest.mark.slow
def test_a_network_is_traced_once_for_all_batch_sizes(monkeypatch):
    real, traces = graphs.traced, []
    monkeypatch.setattr(graphs, "traced", lambda *args: traces.append(args) or real(*args))
    networks = Graphs({"dense": Net(), "compressed": small_net("rtk")}, (IMAGES,))
    comparison = Comparison(networks, (IMAGES,), ("onnx",), 0.0)
    found = [timing for size in (1, 4) for timing in comparison.at(size)]
    assert [(t.batch_size, t.skipped, t.dense is not None) for t in found] == [(1, None, True), (4, None, True)]
    assert len(traces) == 2


def test_a_runtime_that_is_absent_says_so(small, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    found = compare(network(), small, (IMAGES,), 1, "onnx", 0.0)
    assert found.dense is None
    assert "pip install 'tspc[onnx]'" in str(found.skipped)


def test_export_is_public():
    assert tspc.export is export
