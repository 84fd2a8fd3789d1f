"""1-d and grouped convolutions, transposed dense layers, shared weights; which layers are selected."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tspc
from tests.methods import FAMILIES
from tspc.calibration.patches import Positions, input_patches, output_rows
from tspc.calibration.samples import Calibration
from tspc.decompositions import METHODS
from tspc.errors import ConfigError
from tspc.layers.dense import kernel_of
from tspc.layers.forms import tensorized_layers


class Conv1D(nn.Module):
    """As in transformers: a dense layer whose matrix is inputs × outputs."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


class Signals(nn.Module):
    """A network for signals of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 5, padding=2)
        self.wide = nn.Conv1d(16, 24, 4, stride=2, padding=1, dilation=2)
        self.norm = nn.BatchNorm1d(24)
        self.grouped = nn.Conv1d(24, 24, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(24, 24, 3, groups=24)
        self.mixed = Conv1D(30, 24)
        self.head = nn.Linear(30, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.wide(F.relu(self.stem(x)))))
        x = F.relu(self.depthwise(F.relu(self.grouped(x))))
        return self.head(F.relu(self.mixed(x.transpose(1, 2)).mean(1)))


def signals() -> nn.Module:
    torch.manual_seed(0)
    return Signals().eval()


@pytest.mark.parametrize(
    ("name", "calibrated"), [*((name, False) for name in METHODS), *((name, True) for name in FAMILIES)]
)
def test_a_network_for_signals(name, calibrated, tmp_path):
    model, x = signals(), torch.randn(64, 2, 40, generator=torch.Generator().manual_seed(1))
    settings = Calibration(samples=64, batch_size=16)
    given = x if calibrated else None
    small = tspc.compress(model, name, 0.6, allocation="uniform", calibration=given, settings=settings)
    made = tspc.plan(model, name, 0.6, allocation="uniform", example=x)
    assert {row.name for row in made.tensorized} == {"wide", "grouped", "mixed"} == set(tensorized_layers(small))
    assert {row.name: row.reason for row in made.layers}["depthwise"] == "depthwise convolution"
    rebuilt = signals()
    rebuilt.load_state_dict({k: v for k, v in small.state_dict().items() if k in rebuilt.state_dict()}, strict=False)
    for layer, module in tensorized_layers(small).items():
        dense = rebuilt.get_submodule(layer)
        assert module.weight.shape == dense.weight.shape
        dense.weight.data, dense.bias.data = module.weight.detach().clone(), module.bias.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(small(x), rebuilt(x), rtol=1e-4, atol=1e-5)
        folded = tspc.fold_batch_norms(small, x)
        torch.testing.assert_close(folded(x), small(x), rtol=1e-4, atol=1e-5)
        tspc.save(small, tmp_path / "a.safetensors")
        assert torch.equal(tspc.load(tmp_path / "a.safetensors", signals()).eval()(x), small(x))


def test_calibration_of_a_1d_convolution_lowers_the_error_of_the_output():
    model = signals()
    # Signals with a strong common component: what the inputs never show is free.
    x = torch.randn(128, 2, 1) + 0.1 * torch.randn(128, 2, 40)
    errors = []
    for given in (None, x):
        settings = Calibration(samples=128, compensate=False, sensitivity=False, batch_norm="keep")
        small = tspc.compress(
            model, "svd", 0.3, allocation="uniform", calibration=given, settings=settings, include=["wide", "mixed"]
        )
        with torch.no_grad():
            found = {}
            for network in (model, small):
                handle = network.wide.register_forward_hook(lambda m, a, out: found.__setitem__("y", out))  # noqa: B023
                network(x)
                handle.remove()
                found[network] = found["y"]
            errors.append(float((found[model] - found[small]).norm() / found[model].norm()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("positions", [None, Positions(3, (1, 2))])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_patches_of_a_1d_convolution(positions, groups, mode):
    layer = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=groups, padding_mode=mode).double()
    x = torch.randn(3, 4, 17, dtype=torch.float64)
    with torch.no_grad():
        patches = input_patches(layer, x, positions)
        kernels = kernel_of(layer).flatten(1).chunk(groups)
        rows = torch.cat([p @ k.T for p, k in zip(patches, kernels, strict=True)], 1)
        torch.testing.assert_close(rows, output_rows(layer, layer(x), positions))


def test_grouped_2d_convolutions_run_grouped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=4, padding=1, stride=2)).eval()
    small = tspc.compress(model, "tk", 0.7, keep_first=False, keep_last=False, allocation="uniform")
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        wanted = F.conv2d(x, small[0].weight, small[0].bias, stride=2, padding=1, groups=4)
        torch.testing.assert_close(small(x), wanted)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(40, 40), "b": nn.Linear(40, 40), "e": nn.Embedding(30, 40)})
    model["d"] = nn.Linear(40, 30, bias=False)
    model["d"].weight = model["e"].weight
    small = tspc.compress(model, "svd", 0.5, keep_last=False)
    assert small["d"].weight is small["e"].weight
    assert set(tensorized_layers(small)) == {"a", "b"}


def test_selection_by_name_and_size():
    model = nn.ModuleDict({"body": nn.ModuleList([nn.Linear(40, 40) for _ in range(3)]), "little": nn.Linear(9, 9)})
    given = {"keep_last": False, "allocation": "uniform"}
    made = tspc.plan(model, "svd", 0.5, include=["body.*"], exclude=["*.1"], **given)
    assert [row.reason for row in made.layers] == [None, "excluded", None, "not included"]
    made = tspc.plan(model, "svd", 0.5, min_params=1000, **given)
    assert [row.reason for row in made.layers] == [None, None, None, "fewer than 1,000 parameters"]
    with pytest.raises(ConfigError, match=r"include=\['head'\]: no convolution or dense layer has such a name"):
        tspc.plan(model, "svd", 0.5, include=["head"])
