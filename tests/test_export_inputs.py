"""Files take what the network takes: arguments by name, masks, any batch and number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tspc
from tests.tiny_transformers import batch_of, tiny
from tspc.data.answers import answer_of
from tspc.data.model_inputs import ModelInputs
from tspc.deploy.graphs import Graphs
from tspc.deploy.programs import onnx_session
from tspc.deploy.runtimes import opened
from tspc.deploy.timing import Comparison
from tspc.errors import ExportError, TspcWarning
from tspc.layers.forms import tensorized_layers


class Pooled(nn.Module):
    """A small encoder that leaves padded positions out."""

    def __init__(self, by_length: bool = False) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.by_length = by_length

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if self.by_length and input_ids.shape[1] == 7:
            input_ids = input_ids.flip(0)
        x = self.mix(self.words(input_ids)).tanh() * scale
        held = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head((x * held[:, :, None]).sum(1) / held.sum(1, keepdim=True))


def pooled(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return tspc.compress(Pooled(**options), "svd", 0.8, allocation="uniform").eval()


def answers(path: Path, batch: dict[str, Tensor]) -> list[Tensor]:
    """What ONNX Runtime, or torch.export, makes of arguments by name."""
    if path.suffix == ".pt2":
        with path.open("rb") as file:
            found = torch.export.load(file).module()(**batch)
        return [answer_of(found)]  # type: ignore[list-item]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == set(batch)
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in batch.items()})]


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_batch_and_length_are_free_and_masks_count(tmp_path, ending):
    small, path = pooled(), tmp_path / f"small.{ending}"
    tspc.export(small, path, batch_of("bert", 3, 8))
    for count, length in ((5, 13), (1, 3)):
        batch = batch_of("bert", count, length)
        with torch.no_grad():
            torch.testing.assert_close(answers(path, batch)[0], small(**batch), rtol=1e-4, atol=1e-5)
        other = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
        assert not torch.allclose(answers(path, other)[0][-1], answers(path, batch)[0][-1], atol=1e-4)


def test_arguments_that_are_no_tensors_are_part_of_the_file(tmp_path):
    small, batch = pooled(), batch_of("bert", 3, 8)
    tspc.export(small, tmp_path / "small.pt2", ModelInputs((), batch | {"scale": 2.0, "attention_mask": None}))
    ids = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(answers(tmp_path / "small.pt2", ids)[0], small(**ids, scale=2.0))
    with pytest.raises(ExportError, match="an argument by position is no tensor"):
        tspc.export(small, tmp_path / "small.onnx", ModelInputs((batch["input_ids"], None)))


def test_a_length_that_steers_the_network_is_fixed_and_told(tmp_path):
    batch = batch_of("bert", 3, 7)
    with pytest.warns(TspcWarning, match="the file takes inputs of 7 tokens only"):
        tspc.export(pooled(by_length=True), tmp_path / "small.pt2", batch)
    assert answers(tmp_path / "small.pt2", batch_of("bert", 4, 7))[0].shape == (4, 3)


@pytest.mark.parametrize("length", [1, 3])
def test_few_tokens_in_the_example_leave_their_number_free(tmp_path, length):
    small, path = pooled(), tmp_path / "small.pt2"
    tspc.export(small, path, {name: x[:, :length] for name, x in batch_of("bert", 3, 8).items()})
    batch = batch_of("bert", 5, 13)
    with torch.no_grad():
        torch.testing.assert_close(answers(path, batch)[0], small(**batch), rtol=1e-4, atol=1e-5)


class Short(Pooled):
    """Has places for two tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return super().forward((input_ids + torch.arange(2)) % 50, attention_mask, scale)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_file_that_takes_one_length_refuses_others_in_words(tmp_path, ending):
    path, batch = tmp_path / f"short.{ending}", batch_of("bert", 3, 8)
    few = {name: x[:, :2] for name, x in batch.items()}
    tspc.export(Short().eval(), path, few)
    answer = opened(path, ending)
    assert answer(tuple(few.values()))[0].shape == (3, 3)
    with pytest.raises(ExportError, match=r"the file does not take inputs of shape \(3, 8\) int64, \(3, 8\) int64: "):
        answer(tuple(batch.values()))


class Recurrent(nn.Module):
    def __init__(self, packs: bool, **options: Any) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(50, 8), nn.LSTM(8, 12, batch_first=True, **options)
        self.packs = packs

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x: Any = self.words(ids)
        if self.packs:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.rnn(x)[1][0].sum(0)


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:the file takes inputs of 8 tokens")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recurrent(packs=True), "Recurrent cannot be traced by torch.export: a layer gets a PackedSequence"),
        (Recurrent(packs=False, proj_size=4), r"ONNX has no LSTM with projections \(proj_size\); export to pt2"),
    ],
)
def test_recurrent_layers_that_a_file_cannot_hold(tmp_path, model, message):
    batch = {"ids": batch_of("bert", 3, 8)["input_ids"], "lengths": torch.tensor([8, 3, 5])}
    with pytest.raises(ExportError, match=message):
        tspc.export(model.eval(), tmp_path / "small.onnx", batch)


class Named(Pooled):
    """Answers with a dict; one key is that of a value inside the graph, another holds several tensors."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, scale: float = 1.0) -> Any:  # type: ignore[override]
        x = super().forward(input_ids, attention_mask)
        return {"logits": x, "hidden_states": (x + 1, x * 2), "loss": None, "embedding": x.tanh()}


def test_a_graph_has_the_names_of_the_network(tmp_path):
    batch, path = batch_of("bert", 3, 8), tmp_path / "named.onnx"
    model = Named().eval()
    tspc.export(model, path, tuple(batch.values()))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["input_ids", "attention_mask"]
    names = [entry.name for entry in session.get_outputs()]
    assert names[:3] == ["logits", "hidden_states_0", "hidden_states_1"]
    (doubled,) = session.run(["hidden_states_1"], {name: x.numpy() for name, x in batch.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(doubled), 2 * model(**batch)["logits"], rtol=1e-4, atol=1e-5)


class Colliding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return {"a": [y, y + 1], "a_0": y * 2}


def test_two_answers_of_one_name_in_a_file(tmp_path):
    model, x = Colliding().eval(), torch.randn(2, 8)
    tspc.export(model, tmp_path / "a.onnx", x)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for one, wanted in zip(found, (model.layer(x), model.layer(x) + 1, model.layer(x) * 2), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), wanted.detach())


@pytest.mark.slow
def test_inputs_by_position_keep_their_names_and_images_their_axes(tmp_path):
    ids = batch_of("bert", 3, 8)["input_ids"]
    tspc.export(pooled(), tmp_path / "ids.onnx", ids)
    tspc.export(nn.Conv2d(3, 4, 3), tmp_path / "image.onnx", torch.randn(2, 3, 8, 8))
    found = {}
    for name in ("ids", "image"):
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        found[name] = [(entry.name, entry.shape) for entry in session.get_inputs()]
    assert found == {"ids": [("input", ["batch", "length"])], "image": [("input", ["batch", 3, 8, 8])]}


@pytest.mark.slow
def test_files_and_timings_share_the_arguments(tmp_path):
    small, batch = pooled(), batch_of("bert", 3, 8)
    graphs = Graphs({"dense": Pooled().eval(), "compressed": small}, batch)
    tensors = graphs.signature.tensors(batch)
    found = Comparison(graphs, tensors, ("eager",), 0.0).at(2)
    found += Comparison(graphs, tensors, ("onnx", "onnx-int8"), 0.0).at(2)
    assert [(timing.runtime, timing.skipped) for timing in found] == [
        (name, None) for name in ("eager", "onnx", "onnx-int8")
    ]
    done = tspc.export(small, tmp_path / "small.int8.onnx", batch, calibration=[batch, batch_of("bert", 2, 8)])
    assert done.int8 is not None
    given = opened(tmp_path / "small.int8.onnx", "int8")(graphs.signature.tensors(batch_of("bert", 2, 5)))
    assert given[0].shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "whisper"])
def test_networks_of_transformers(tmp_path, name):
    layers = {"encoder_layers": 1, "decoder_layers": 1} if name == "whisper" else {"num_hidden_layers": 1}
    small = tspc.compress(tiny(name, **layers), "svd", 0.5, allocation="uniform").eval()
    path = tmp_path / "small.onnx"
    tspc.export(small, path, batch_of(name, 3, 8))
    for count, length in ((5, 13), (1, 3)):
        batch = batch_of(name, count, length)
        held = batch.get("attention_mask", torch.ones(count, length)).bool()
        with torch.no_grad():
            wanted = answer_of(small(**batch))
        assert wanted is not None
        ours, theirs = (x[held] if x.ndim == 3 else x for x in (answers(path, batch)[0], wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_file_that_takes_any_length_holds_factors_and_not_kernels(tmp_path):
    """Whether the network takes fewer tokens is tried before it is traced; kernels of that call are not written."""
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Embedding(50, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 3)
    ).eval()
    small = tspc.compress(wide, "rtt", 0.1, allocation="uniform").eval()
    assert [layer.path for layer in tensorized_layers(small).values()] == ["rebuilt"] * 2
    path = tmp_path / "small.onnx"
    tspc.export(small, path, torch.randint(3, 50, (3, 8)))
    assert path.stat().st_size < 4 * sum(p.numel() for p in small.parameters()) + 20_000
    ids = torch.randint(3, 50, (2, 5))
    found = onnx_session(path).run(None, {"input": ids.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), small(ids).detach(), rtol=1e-4, atol=1e-5)
