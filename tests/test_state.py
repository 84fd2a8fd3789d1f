"""Every parameter and buffer is loaded as the file has it; what a file cannot hold is refused by name."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tspc
from tests.nets import Net, images
from tspc.errors import WeightsError
from tspc.layers.forms import tensorized_layers


class Tables(nn.Module):
    """A complex table, one that the state dict leaves out, and one of float32 whatever the layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.register_buffer("turns", torch.polar(torch.ones(32), torch.arange(32.0)))
        self.register_buffer("scale", torch.rand(64))
        self.register_buffer("hidden", torch.ones(64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        x = torch.view_as_real(torch.view_as_complex(x.float().reshape(-1, 32, 2)) * self.turns).reshape(-1, 64)
        return self.c(F.relu(self.b((x * self.scale).to(self.b.weight.dtype) * self.hidden)))


def loaded(small: nn.Module, into: nn.Module, folder) -> nn.Module:
    tspc.save(small, folder / "a.safetensors")
    return tspc.load(folder / "a.safetensors", into)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_tensor_has_the_type_of_the_file(dtype, tmp_path):
    model = Tables()
    for module in (model.a, model.b, model.c):
        module.to(dtype)
    model.hidden = model.hidden.to(dtype)
    small = tspc.compress(model, "svd", 0.5, allocation="uniform").eval()
    other = loaded(small, Tables(), tmp_path).eval()
    types = {name: value.dtype for name, value in other.named_buffers()}
    assert types == {"turns": torch.complex64, "scale": torch.float32, "hidden": dtype}
    x = torch.randn(3, 32).to(dtype)
    assert torch.equal(other(x), small(x))
    assert {p.dtype for p in other.parameters()} == {dtype}


def test_a_network_on_the_meta_device_gets_values_and_keeps_its_ties(tmp_path):
    def build() -> nn.Module:
        model = Net()
        model.again = nn.Linear(64, 48)
        model.again.weight = model.hidden.weight
        return model

    small = tspc.compress(build(), "tk", 0.5, allocation="uniform").eval()
    with torch.device("meta"):
        empty = build()
    empty.stem.weight.requires_grad_(False)
    other = loaded(small, empty, tmp_path).eval()
    assert torch.equal(other(images()), small(images()))
    assert other.again.weight is other.hidden.weight
    assert not other.stem.weight.requires_grad
    assert tensorized_layers(other)
    with torch.device("meta"):
        empty = Tables()
    with pytest.raises(
        WeightsError, match=r"a\.safetensors: has no values for hidden, which the network has on the me"
    ):
        loaded(tspc.compress(Tables(), "svd", 0.5), empty, tmp_path)
    assert type(empty.a) is nn.Linear
    with pytest.raises(WeightsError, match="has no values"):
        tspc.save(empty, tmp_path / "b.safetensors")


def test_whole_numbers_do_not_take_the_place_of_real_ones(tmp_path):
    model, other = Net(), Net()
    model.norm0.running_mean = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(WeightsError, match=r"norm0\.running_mean is int64 instead of float32"):
        loaded(model, other, tmp_path)
    assert other.norm0.running_mean.dtype == torch.float32


def test_a_dense_layers_flags_are_those_of_its_factors(tmp_path):
    model = Net()
    model.wide.weight.requires_grad_(False)
    model.point.bias.requires_grad_(False)
    small = tspc.compress(model, "tk", 0.5, allocation="uniform")
    fresh = Net()
    fresh.wide.weight.requires_grad_(False)
    fresh.point.bias.requires_grad_(False)
    for found in (small, loaded(small, fresh, tmp_path)):
        assert [p.requires_grad for p in found.wide.factor_parameters()] == [False] * 3
        assert all(p.requires_grad for p in found.point.factor_parameters())
        assert not found.point.bias.requires_grad


STATES = {
    "a dict": {"version": 2, "names": ["a", None], 3: (True, 0.5)},
    "tensors": {"ema": {"w": torch.arange(3), "c": torch.ones(2, dtype=torch.complex64)}},
    "numbers": [math.inf, -1e300, 2**70],
    "ordered": OrderedDict(b=1, a=2),
    "a tensor": torch.arange(4.0),
}


class Extra(Net):
    def __init__(self, state: object = None) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_extra_state_comes_back(state, tmp_path):
    small = tspc.compress(Extra(state), "tk", 0.5, allocation="uniform").eval()
    into = Extra(torch.zeros(4) if isinstance(state, torch.Tensor) else None)
    other = loaded(small, into, tmp_path).eval()
    assert repr(other.state).removeprefix("Ordered") == repr(dict(state) if isinstance(state, dict) else state)
    assert torch.equal(other(images()), small(images()))
    if not isinstance(state, torch.Tensor):
        with pytest.warns(tspc.errors.TspcWarning, match="not the extra state _extra_state"):
            tspc.export(small, tmp_path / "b.safetensors", images())


def test_extra_state_that_only_code_could_rebuild_is_refused(tmp_path):
    model = Extra({"when": {1, 2}})
    with pytest.raises(WeightsError, match="_extra_state holds a set: of extra state only numbers, texts, tensors"):
        tspc.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "kind"),
    [(torch.eye(3).to_sparse(), "sparse_coo"), (torch.ones(2, dtype=torch.complex128), "complex128")],
)
def test_tensors_that_a_file_cannot_hold_are_named(value, kind, tmp_path):
    model = Net()
    model.register_buffer("odd", value)
    with pytest.raises(WeightsError, match=f"odd is a tensor of kind {kind}, which safetensors cannot hold"):
        tspc.save(model, tmp_path / "a.safetensors")
