"""Tables of embeddings in few bits whose weight the output layer shares: one vector of integers serves both."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tspc
from tests.test_embeddings_low_rank import IDS, SETTINGS, Speaker, count, speaker
from tspc.compression.header import FORMAT, FORMAT_OF_BASES, FORMAT_OF_PARTS
from tspc.compression.integers import state_bytes
from tspc.compression.rounding import put_on_grids_, take_off_grids_
from tspc.errors import ConfigError, WeightsError
from tspc.layers.forms import tensorized_layers
from tspc.models.safe_files import read_tensors, write_tensors


def small(**options: Any) -> nn.Module:
    given = {"method": "svd", "calibration": IDS, "settings": SETTINGS} | options
    return tspc.compress(speaker(True), **given).eval()


def are_tied(model: Any, ends: tuple[str, str] = ("words", "head")) -> bool:
    """Whether both layers have the same factors and scales."""
    one, two = (model.get_submodule(name) for name in ends)
    pairs = zip(one.factor_parameters(), two.factor_parameters(), strict=True)
    scales = zip(one.grids, two.grids, strict=True)
    return all(a is b for a, b in pairs) and all(torch.equal(a.scales, b.scales) for a, b in scales)


@pytest.mark.parametrize(("size", "calibrated"), [(0.13, True), (0.3, False), (0.3, True), (0.5, False)])
@torch.no_grad()
def test_a_size_is_met_and_the_file_holds_the_table_once(tmp_path, size, calibrated):
    model, given = speaker(True), IDS if calibrated else None
    made = tspc.plan(model, "svd", size=size, calibration=given, settings=SETTINGS if calibrated else None)
    result = small(size=size, calibration=given, settings=SETTINGS if calibrated else None)
    assert made.network_bytes == state_bytes(result) <= size * state_bytes(model)
    path = tmp_path / "small.safetensors"
    tspc.save(result, path)
    assert path.stat().st_size < state_bytes(result) + 5_000
    loaded = tspc.load(path, speaker(True))
    assert torch.equal(loaded(IDS), result(IDS))
    assert count(loaded) == count(result)
    assert are_tied(result)
    assert are_tied(loaded)
    tensors = read_tensors(path).tensors
    assert "words.integers" in tensors
    assert not [name for name in tensors if name.startswith("head.") and "bias" not in name]
    assert made.kept == ("head.bias",)
    assert torch.equal(loaded.state_dict()[_bias(loaded)], model.head.bias)
    tspc.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def _bias(model: nn.Module) -> str:
    return next(name for name in model.state_dict() if name.startswith("head.") and name.endswith("bias"))


def test_a_size_that_leaves_the_table_as_it_is_leaves_the_layer_too(tmp_path):
    made = tspc.plan(speaker(True), "svd", size=0.9, calibration=IDS, settings=SETTINGS)
    assert (made.layers[0].bits, made.layers[2].bits) == (32, 32)
    result = small(size=0.9)
    assert made.network_bytes == state_bytes(result)
    tspc.save(result, tmp_path / "small.safetensors")
    loaded = tspc.load(tmp_path / "small.safetensors", speaker(True))
    assert loaded.head.weight is loaded.words.weight


@pytest.mark.parametrize("bits", [8, 3])
def test_both_sides_compute_with_the_rounded_table(bits):
    result = small(method="dense", bits=bits)
    assert {name: layer.bits for name, layer in tensorized_layers(result).items()}["head"] == bits
    assert torch.equal(result.head.weight, result.words.weight)
    torch.testing.assert_close(result.words(IDS), result.words.weight[IDS])
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.head(x), x @ result.words.weight.T + result.head.bias)


def test_the_inputs_of_the_output_layer_count_when_a_table_is_rounded():
    """By the norm of both, rounding loses less than by that of the rows alone, where the output layer answers."""
    model, states = speaker(True), []
    handle = model.head.register_forward_pre_hook(lambda module, given: states.append(given[0].detach()))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    rows = states[0].flatten(0, 1)
    alone = tspc.compress(_unshared(), "dense", bits=3, calibration=IDS, settings=SETTINGS, include=["words"])
    errors = [
        ((rows @ (network.words.weight - model.words.weight).T).norm() / (rows @ model.words.weight.T).norm()).item()
        for network in (small(method="dense", bits=3), alone)
    ]
    assert errors[0] < 0.9 * errors[1]


def _unshared() -> Speaker:
    model = speaker(True)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def test_training_and_rounding_again_keep_the_tie():
    result = small(size=0.3).train()
    optimizer = torch.optim.Adam(result.parameters(), 1e-3)
    for _ in range(3):
        loss = result(IDS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert are_tied(result)
    steps = result.head.weight / result.head.grids[0].scales[:, None]
    torch.testing.assert_close(steps, steps.round())
    trained = result(IDS).detach()
    torch.testing.assert_close(result.eval()(IDS), trained)
    widths = take_off_grids_(result)
    assert {"words", "head"} <= widths.keys()
    with torch.no_grad():
        torch.testing.assert_close(result(IDS), trained)
        put_on_grids_(result, speaker(True), widths)
        assert are_tied(result)
        assert (result(IDS) - trained).norm() < 0.02 * trained.norm()


def test_only_a_file_with_shared_integers_has_the_last_format(tmp_path):
    formats = []
    for network in (small(method="dense", bits=8), small(rate=0.6, rate_scope="network"), small(method="id", rate=0.6)):
        tspc.save(network, tmp_path / "small.safetensors")
        formats.append(json.loads(read_tensors(tmp_path / "small.safetensors").header or "")["format"])
    assert formats == [FORMAT, FORMAT_OF_PARTS, FORMAT_OF_BASES]


@pytest.mark.parametrize("options", [{"exclude": ["head"]}, {"filter_fn": lambda name, layer: name != "head"}])
def test_a_layer_that_the_user_leaves_out_keeps_the_weight_that_it_shares(options):
    made = tspc.plan(speaker(True), "svd", size=0.8)
    assert made.layers[-1].reason == "its weight is shared with words; both change together"
    made = tspc.plan(speaker(True), "svd", size=0.8, **options)
    assert made.layers[-1].reason == "its weight is shared with words"
    result = small(size=0.8, **options)
    assert not {"words", "head"} & tensorized_layers(result).keys()
    assert result.head.weight is result.words.weight
    assert torch.equal(result.head.weight, speaker(True).head.weight)


def test_a_table_that_is_included_includes_the_layer_that_shares_its_weight():
    assert are_tied(small(method="dense", bits=8, include=["words"]))


class Named(Speaker):
    """A tied network in which a layer has two names."""

    def __init__(self, which: str) -> None:
        super().__init__(True)
        self.other = self.get_submodule(which)


@pytest.mark.parametrize("which", ["words", "head", "middle.0"])
@pytest.mark.parametrize("options", [{"method": "dense", "bits": 8}, {"method": "svd", "size": 0.3}])
@torch.no_grad()
def test_a_layer_with_two_names_is_saved_once_and_loads(tmp_path, which, options):
    model, path = Named(which).eval(), tmp_path / "small.safetensors"
    made = tspc.plan(model, **options)
    result = tspc.compress(model, **options)
    assert made.network_bytes == state_bytes(result)
    tspc.save(result, path)
    assert not [name for name in read_tensors(path).tensors if name.startswith("other.")]
    loaded = tspc.load(path, Named(which).eval())
    assert loaded.other is loaded.get_submodule(which)
    assert torch.equal(loaded(IDS), result(IDS))


class Biases(nn.Module):
    """A network whose biases are zero, as those of GPT-2 before its training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layers = nn.Embedding(90, 24), nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
        self.head = nn.Linear(24, 90, bias=False)
        self.head.weight = self.words.weight
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.words(ids)))


@pytest.mark.parametrize("options", [{"method": "dense", "bits": 8}, {"method": "svd", "size": 0.15}])
def test_biases_that_compensation_makes_tiny_do_not_exceed_the_plan(options):
    model, given = Biases().eval(), {"calibration": IDS % 90, "settings": SETTINGS}
    made = tspc.plan(model, **options, **given)
    result = tspc.compress(model, **options, **given)
    biases = [layer.bias for name, layer in tensorized_layers(result).items() if name.startswith("layers")]
    assert any(0 < bias.abs().max() < 1e-3 for bias in biases)
    assert made.network_bytes == state_bytes(result)


class Mostly(nn.Module):
    """A network that is hardly more than its table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(400, 16), nn.Linear(16, 400, bias=False)
        self.head.weight = self.words.weight
        self.middle = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.words(ids)))


@pytest.mark.parametrize("options", [{"rate": 0.5, "rate_scope": "network"}, {"size": 0.2}])
@torch.no_grad()
def test_a_file_that_is_mostly_a_shared_table_loads(tmp_path, options):
    ids, path = torch.randint(400, (8, 5)), tmp_path / "small.safetensors"
    result = tspc.compress(Mostly().eval(), "svd", **options)
    assert "head" in tensorized_layers(result)
    tspc.save(result, path)
    assert torch.equal(tspc.load(path, Mostly().eval())(ids), result(ids))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"head.factor_list.0": "words.factor_list.0"', '"head.factor_list.0": "middle.0.bias"'),
        ('"tied": {"head.factor_list.0": "words.factor_list.0"}', '"tied": {}'),
    ],
)
def test_a_damaged_tie_is_refused(tmp_path, old, new):
    path = tmp_path / "small.safetensors"
    tspc.save(small(method="dense", bits=8), path)
    file = read_tensors(path)
    header = str(file.header).replace(old, new)
    assert header != file.header
    write_tensors(path, dict(file.tensors), header)
    with pytest.raises(WeightsError, match=r"the integers of layer head are missing|more numbers than the file holds"):
        tspc.load(path, speaker(True))


def test_layers_that_share_integers_in_two_forms_are_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    tspc.save(small(method="dense", bits=8), path)
    file = read_tensors(path)
    before, head, after = str(file.header).partition('"head": {')
    write_tensors(path, dict(file.tensors), before + head + after.replace('"bits": 8', '"bits": 4', 1))
    with pytest.raises(WeightsError, match="the integers of layer head are missing, damaged"):
        tspc.load(path, speaker(True))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_file_with_two_weights_is_refused_where_they_are_one(tmp_path, bits):
    path = tmp_path / "small.safetensors"
    with torch.no_grad():
        other = _unshared()
        other.head.weight.mul_(2)
    tspc.save(tspc.compress(other, "dense", bits=8) if bits == 8 else tspc.compress(other, "svd", 0.6), path)
    with pytest.raises(WeightsError, match="are one parameter in the network given, but differ in the file"):
        tspc.load(path, speaker(True))


def test_inputs_that_are_no_samples_are_named():
    model = speaker(True)
    with pytest.raises(ConfigError, match=r"samples is Tensor: give apply_ tspc.Samples"):
        tspc.apply_(model, tspc.plan(model, "dense", bits=8), IDS)


@pytest.mark.parametrize("ending", ["onnx", "pt2", "int8.onnx"])
@torch.no_grad()
def test_an_exported_file_holds_the_table_once(tmp_path, ending):
    model, result = speaker(True), small(method="dense", bits=8)
    done = tspc.export(result, tmp_path / f"small.{ending}", IDS[:4], calibration=IDS.split(16))
    tspc.export(model, tmp_path / f"dense.{ending}", IDS[:4], calibration=IDS.split(16))
    assert done.relative < (0.1 if ending == "int8.onnx" else 1e-5)
    one, two = (path.stat().st_size for path in (tmp_path / f"small.{ending}", tmp_path / f"dense.{ending}"))
    assert one < two + 20_000 < two + 4 * model.words.weight.numel()


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_of_transformers_generates_and_stays_tied(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def network() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=48, n_layer=2, n_head=4)).eval()

    result = tspc.compress(network(), "svd", size=0.2, calibration=IDS, settings=SETTINGS).eval()
    assert state_bytes(result) <= 0.2 * state_bytes(network())
    tspc.save(result, tmp_path / "folder")
    loaded: Any = tspc.load(tmp_path / "folder")
    loaded.tie_weights()
    assert are_tied(loaded, ("transformer.wte", "lm_head"))
    assert torch.equal(loaded(IDS).logits, result(IDS).logits)
    words = loaded.generate(IDS[:2, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(words, result.generate(IDS[:2, :4], max_new_tokens=4, do_sample=False, pad_token_id=0))
