"""A layer in the place of a dense one: it has its attributes, is called as it was, and keeps its hooks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tspc
from tests.nets import Net, images
from tspc.decompositions import METHODS
from tspc.errors import TspcError, TspcWarning
from tspc.layers.dense import kernel_shape
from tspc.layers.forms import tensorize, tensorized_layers

LAYERS = {
    "linear": nn.Linear(12, 10),
    "conv1d": nn.Conv1d(12, 10, 3, stride=2, padding=1),
    "conv2d": nn.Conv2d(12, 10, (3, 1), stride=(1, 2), padding=(1, 0), dilation=(2, 1), padding_mode="reflect"),
    "grouped": nn.Conv2d(12, 10, 3, groups=2, padding="same", bias=False),
}
SHOWN = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "padding_mode", "output_padding", "transposed", "_reversed_padding_repeated_twice", "note"),
)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dense", LAYERS.values(), ids=LAYERS)
def test_the_attributes_of_the_dense_layer_are_shown(name, dense):
    layer = copy.deepcopy(dense)
    layer.note = {"of": "a user"}
    method = METHODS[name]().for_shape(kernel_shape(layer))
    small = tensorize(layer, method, method.rank_for(kernel_shape(layer), 10_000))
    for twin in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        own = {key: getattr(twin, key) for key in SHOWN if hasattr(twin, key)}
        assert own == {key: getattr(layer, key) for key in SHOWN if hasattr(layer, key)}
        assert (twin.weight.shape, twin.bias is None) == (layer.weight.shape, layer.bias is None)


def test_conv1d_of_transformers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = Conv1D(10, 12)
    small = tensorize(layer, METHODS["svd"](), (4,))
    assert (small.nf, small.nx) == (10, 12)
    x = torch.randn(2, 12)
    assert torch.equal(small(x=x), small(x))


class Keywords(Net):
    """Reads sizes, and calls by keyword."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.wide(input=F.relu(self.norm0(self.stem(x))))))
        x = self.point(input=F.pad(x, [self.point.kernel_size[0] // 2] * 4))
        return self.head(F.relu(self.hidden(input=x.mean((2, 3)).view(-1, self.hidden.in_features))))


@pytest.mark.parametrize("name", ["svd", "rtt"])
def test_networks_that_read_their_layers_and_call_them_by_keyword(name):
    small = tspc.compress(Keywords(), name, 0.5, allocation="uniform").eval()
    assert {"wide", "point", "hidden"} <= set(tensorized_layers(small))
    with torch.no_grad():
        dense = copy.deepcopy(small)
        for key, layer in tensorized_layers(small).items():
            twin = copy.deepcopy(Net().get_submodule(key))
            twin.weight.copy_(layer.weight)
            twin.bias = layer.bias
            setattr(dense, key, twin)
        torch.testing.assert_close(small(images()), dense(images()), rtol=1e-4, atol=1e-5)


class Listed(nn.Module):
    """Knows its layers by plain lists and dicts, too, and runs those."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.row, self.named = [[self.a, torch.relu], (self.b, torch.tanh)], {"head": {"last": self.c}}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, activation in self.row:
            x = activation(layer(x))
        return self.named["head"]["last"](x)


def test_lists_of_layers_know_their_replacements(tmp_path):
    model, x = Listed(), torch.randn(5, 32)
    small = tspc.compress(model, "svd", 0.3, allocation="uniform", keep_last=False)
    wanted = small.c(torch.tanh(small.b(torch.relu(small.a(x)))))
    assert set(tensorized_layers(small)) == {"a", "b", "c"}
    assert torch.equal(small(x), wanted)
    assert not torch.allclose(model(x), wanted)
    tspc.save(small, tmp_path / "a.safetensors")
    assert torch.equal(tspc.load(tmp_path / "a.safetensors", Listed())(x), wanted)


def test_hooks_stay_and_their_handles_remove_them(tmp_path):
    seen: list[str] = []
    model = Net().eval()
    handles = [
        model.wide.register_forward_hook(lambda module, args, kwargs, output: seen.append("after"), with_kwargs=True),
        model.wide.register_forward_pre_hook(lambda module, args: seen.append("before")),
        model.wide.register_full_backward_hook(lambda module, given, out: seen.append("backward")),
        model.point.register_forward_hook(lambda module, args, output: 2 * output),
    ]
    small = tspc.compress(model, "svd", 0.5, allocation="uniform")
    seen.clear()
    answer = small(images())
    answer.sum().backward()
    assert seen == ["before", "after", "backward"]
    tspc.save(small, tmp_path / "a.safetensors")
    other = tspc.load(tmp_path / "a.safetensors", copy.deepcopy(model))
    torch.testing.assert_close(other(images()), small(images()))
    tspc.apply_(model, tspc.plan(model, "svd", 0.5, allocation="uniform"))
    torch.testing.assert_close(model.eval()(images()), small.eval()(images()))
    doubled = model(images())
    seen.clear()
    for handle in handles:
        handle.remove()
    assert not torch.allclose(model(images()), doubled)
    assert seen == []


def test_hooks_on_the_state_dict_are_named():
    model = Net()
    model.wide.register_state_dict_pre_hook(lambda module, prefix, keep: None)
    with pytest.warns(TspcWarning, match="hooks on the state dict of wide do not act on the compressed layers") as said:
        tspc.compress(model, "svd", 0.5, allocation="uniform")
    assert len(said) == 1


def test_save_pretrained_of_a_compressed_network_writes_what_load_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"encoder": transformers.BertForSequenceClassification(config)})

    small = tspc.compress(build(), "svd", 0.5, allocation="uniform").eval()
    tspc.save(small, tmp_path / "a.safetensors")
    loaded = tspc.load(tmp_path / "a.safetensors", build()).eval()
    in_place = build().eval()
    tspc.apply_(in_place, tspc.plan(in_place, "svd", 0.5))
    ids = torch.randint(0, 50, (2, 5))
    for i, network in enumerate((small, loaded, in_place, pickle.loads(pickle.dumps(small)), copy.deepcopy(small))):
        network["encoder"].save_pretrained(tmp_path / str(i))
        again = tspc.load(tmp_path / str(i))
        assert torch.equal(again(ids).logits, network["encoder"](ids).logits)


def test_save_pretrained_of_another_library_is_refused(tmp_path):
    class Savable(nn.Sequential):
        def save_pretrained(self, folder: str) -> None:
            raise AssertionError(folder)

    small = tspc.compress(Savable(nn.Linear(32, 32), nn.Linear(32, 32)), "svd", 0.5)
    with pytest.raises(TspcError, match=r"tspc\.save\(model, .* tspc\.load\(.*Savable\(config"):
        small.save_pretrained(str(tmp_path))
