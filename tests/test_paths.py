"""Paths: one function whichever is taken, kept kernels that never lag behind, a choice by cost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import tspc
from tests.conftest import TINY
from tests.nets import Net, a_layer, images, small_net
from tspc.compression.apply import tensorized
from tspc.compression.path_costs import GAIN, Costs, input_sizes
from tspc.compression.plan import SLOWER, Plan
from tspc.decompositions import METHODS, Decomposition
from tspc.deploy import cost
from tspc.errors import ConfigError, DataError
from tspc.layers.chains import CHAIN, REBUILT, groupings, members, merged
from tspc.layers.dense import kernel_shape
from tspc.layers.forms import tensorized_layers, untrained
from tspc.phases.plan import macs_at

each_method = pytest.mark.parametrize("name", METHODS)


# --- the same function ------------------------------------------------------------------------------------------


def test_names_of_paths():
    assert groupings(3) == ["chain", "1|23", "12|3", "rebuilt"]
    assert len(groupings(4)) == 8
    assert members("1|234", 4) == [range(0, 1), range(1, 4)]
    with pytest.raises(ConfigError, match=r"path '2\|1' does not exist here; choose one of chain, 1\|23"):
        members("2|1", 3)


def low_ranks(method: Decomposition, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ranks of ones and twos that the method can use."""
    return [
        rank
        for rank in product(*(range(1, min(2, top) + 1) for top in method.max_rank(shape)))
        if method.is_useful(shape, rank)
    ]


@each_method
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 12)], ids=["conv", "linear"])
def test_every_path_of_every_low_rank_computes_the_rebuilt_kernel_and_costs_what_is_planned(name, layer):
    layer, convolves = layer.double(), isinstance(layer, nn.Conv2d)
    shape = kernel_shape(layer)
    method = METHODS[name]().for_shape(shape)
    x = torch.randn(1, 8, *((6, 5) if convolves else ()), dtype=torch.float64)
    costs = Costs(objective="macs", sizes={"0": (6, 5) if convolves else (1, 1)})
    for rank in low_ranks(method, shape):
        small = untrained(layer, method, rank).eval()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.normal_()
            wanted = functional_call(layer, {"weight": small.weight, "bias": small.bias}, (x,))
        for path in small.paths:
            small.path = path
            torch.testing.assert_close(small(x), wanted, rtol=1e-10, atol=1e-10, msg=f"{path} at {rank}")
            assert [tuple(kernel.shape) for kernel in small.kernels()] == [
                (*stage.shape, 1, 1)[:4] if convolves else stage.shape[:2] for stage in small.stages
            ]
            assert costs.of(layer, "0", method, rank, path) == cost(small, (x,)).macs, (path, rank)


@pytest.mark.parametrize("widths", [(12, 6, 18, 6), (6, 6, 6, 6)], ids=str)
def test_links_of_any_groups_merge_into_one_dense_kernel(widths):
    x = torch.randn(2, widths[0], 5, 6, dtype=torch.float64)
    for groups in product((1, 2, 3, 6), repeat=3):
        kernels, wanted = [], x
        for before, after, window, count in zip(widths, widths[1:], ((3, 1), (1, 2), (1, 1)), groups, strict=False):
            kernels.append(torch.randn(after, before // count, *window, dtype=torch.float64))
            wanted = F.conv2d(wanted, kernels[-1], groups=count)
        found = merged(kernels, widths[0])
        assert found.shape == (6, widths[0], 3, 2)
        torch.testing.assert_close(F.conv2d(x, found), wanted, rtol=1e-10, atol=1e-10, msg=f"groups {groups}")


@each_method
def test_gradients_do_not_depend_on_the_path(name):
    layer = a_layer(name).double().train()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for path in layer.paths:
        layer.path = path
        found.append(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]))
    for gradients in found[1:]:
        for a, b in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- the choice -------------------------------------------------------------------------------------------------


def test_input_sizes():
    sizes = input_sizes(Net(), ["stem", "wide", "point", "hidden"], images())
    assert sizes == {"stem": (12, 12), "wide": (12, 12), "point": (6, 6), "hidden": (1, 1)}
    assert input_sizes(Net(), ["stem"], torch.randn(1, 7)) == {}


@pytest.mark.parametrize("paths", ["model", "measure"])
def test_no_path_costs_more_than_another(paths):
    layer = nn.Conv2d(64, 64, 3, padding=1)
    method = METHODS["tt"]()
    for rank in ((8, 8, 8), (64, 100, 64)):
        costs = Costs(paths, "latency", {"0": (16, 16)})
        row = tspc.plan(nn.Sequential(layer), "tt", 0.5, keep_first=False, keep_last=False).layers[0]
        best = costs.best(layer, replace(row, rank=rank))
        options = untrained(layer, method, rank).paths
        assert len(options) == 8
        assert costs.of(layer, "0", method, rank, best.path) * GAIN <= min(
            costs.of(layer, "0", method, rank, path) for path in options
        )


def test_low_ranks_run_as_chains_and_high_ones_rebuilt():
    layer, costs = nn.Conv2d(64, 64, 3, padding=1), Costs(sizes={"0": (28, 28)})
    row = tspc.plan(nn.Sequential(layer), "tk", 0.5, keep_first=False, keep_last=False).layers[0]
    assert costs.best(layer, replace(row, rank=(8, 8))).path == CHAIN
    assert costs.best(layer, replace(row, rank=(64, 64))).path == REBUILT
    macs = Costs(objective="macs", sizes={"0": (28, 28)})
    assert macs.of(layer, "0", METHODS["tk"](), (8, 8), CHAIN) == 28 * 28 * (64 * 8 + 8 * 8 * 9 + 8 * 64)
    assert macs.of(layer, "0", METHODS["tk"](), (8, 8), REBUILT) == 28 * 28 * 64 * 64 * 9


@each_method
def test_the_path_is_planned_and_saved(name, tmp_path):
    made = tspc.plan(Net(), name, 0.5, allocation="uniform", example=images())
    assert all(row.path is not None for row in made.tensorized)
    assert Plan.from_dict(made.to_dict()) == made
    assert f", {made.tensorized[0].path}," in str(made)
    assert sum(made.paths.values()) == len(made.tensorized)
    small = Net().eval()
    tspc.apply_(small, made)
    layers = tensorized_layers(small)
    assert {n: layer.path for n, layer in layers.items()} == {row.name: row.path for row in made.tensorized}
    for layer in layers.values():
        layer.path = layer.paths[len(layer.paths) // 2]
    tspc.save(small, tmp_path / "a.safetensors")
    loaded = tspc.load(tmp_path / "a.safetensors", Net()).eval()
    assert [x.path for x in tensorized_layers(loaded).values()] == [x.path for x in layers.values()]
    with torch.no_grad():
        assert torch.equal(loaded(images()), small(images()))


@pytest.mark.parametrize("objective", ["latency", "macs"])
def test_what_is_no_faster_stays_dense_within_the_budget(objective):
    for name in ("svd", "rtt"):
        made = tspc.plan(Net(), name, 0.6, allocation="uniform", objective=objective, example=images())
        assert made.rate_reached <= 0.6
        assert made.tensorized
        assert all(row.method is None for row in made.layers if row.reason == SLOWER)
    assert any(row.reason == SLOWER for row in made.layers)
    assert not any(row.reason == SLOWER for row in tspc.plan(Net(), "rtt", 0.6, allocation="uniform").layers)


@each_method
def test_the_macs_of_a_plan_are_those_of_the_network(name):
    model, example = Net().eval(), images(1)
    plans = {rate: tspc.plan(model, name, rate, example=example, keep_first=False) for rate in (0.2, 0.5)}
    found = macs_at(model, plans, example)
    for rate, made in plans.items():
        small, _ = tensorized(model, made)
        assert found[rate] == pytest.approx(cost(small, (example,)).macs / cost(model, (example,)).macs, abs=1e-12)
    assert macs_at(model, plans, None) == macs_at(model, plans, torch.randn(1, 7)) == {}


class Repeated(nn.Module):
    """A convolution called twice, on maps of two sizes, a grouped one, and a dense layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, groups=2)
        self.tokens = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.twice(self.twice(x)[..., ::2, ::2]))
        return self.tokens(x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("count", [1, 2])
def test_every_call_of_a_layer_counts(count):
    model, example = Repeated().eval(), torch.randn(count, 16, 12, 12)
    options = {"allocation": "uniform", "objective": "macs", "keep_first": False, "keep_last": False}
    made = tspc.plan(model, "svd", 0.3, example=example, **options)
    small, _ = tensorized(model, made)
    assert [row.path for row in made.tensorized] == [CHAIN, REBUILT, CHAIN]
    before, after = (cost(network, (example,)).macs for network in (model, small))
    assert macs_at(model, {0.3: made}, example) == {0.3: pytest.approx(after / before, abs=1e-12)}


def test_what_stays_dense_saves_nothing():
    model, example = Net().eval(), images(1)
    made = tspc.plan(model, "svd", 1.0, allocation="uniform", example=example)
    dense = replace(made, layers=tuple(replace(row, method=None, rank=None, path=None) for row in made.layers))
    assert macs_at(model, {1.0: dense}, example) == {1.0: 1.0}


def test_wrong_settings():
    with pytest.raises(
        ConfigError, match="objective=speed: expected one of parameters, .*; paths=fast: expected one of model"
    ):
        tspc.plan(Net(), "tt", 0.5, paths="fast", objective="speed")


# --- batch norms ------------------------------------------------------------------------------------------------


@each_method
def test_folded_batch_norms_change_nothing(name):
    small, x = small_net(name).double(), images().double()
    folded = tspc.fold_batch_norms(small, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not tensorized_layers(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), small(x), rtol=1e-10, atol=1e-10)
    assert any(isinstance(m, nn.BatchNorm2d) for m in small.modules()), "the original is left alone"
    with pytest.raises(DataError, match=r"cannot take images of shape \(1, 7\)"):
        tspc.fold_batch_norms(small, torch.randn(1, 7).double())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_computed_from_others_takes_no_batch_norm_over():
    model = Net().eval()
    with torch.no_grad():  # else it could not be copied
        torch.nn.utils.weight_norm(model.wide)
    folded = tspc.fold_batch_norms(model, images())
    assert isinstance(folded.norm1, nn.BatchNorm2d)
    torch.testing.assert_close(folded(images()), model(images()))


def test_a_batch_norm_of_a_tensor_with_other_uses_is_kept():
    class Skip(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.stem(x)
            return self.norm0(first) + first

    model = Skip().eval()
    folded = tspc.fold_batch_norms(model, images())
    assert isinstance(folded.norm0, nn.BatchNorm2d)
    torch.testing.assert_close(folded(images()), model(images()))


def test_a_batch_norm_of_an_output_that_is_an_answer_too_is_kept():
    class Both(Net):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first = self.stem(x)
            return self.norm0(first), first

    model = Both().eval()
    folded = tspc.fold_batch_norms(model, images())
    torch.testing.assert_close(folded(images()), model(images()))


@pytest.mark.slow
def test_a_run_keeps_its_paths(cli, tmp_path):
    code, _, err = cli(
        *TINY, "phase=decompose", "method=tk", "rate=0.5", "objective=latency", "paths=measure", "pretrained=random"
    )
    assert (code, err) == (0, "")
    run = tmp_path / "outputs/synthetic/resnet8/tk-0.5/seed0"
    result = json.loads((run / "result.json").read_text())
    loaded = tensorized_layers(tspc.load(run / "model.safetensors"))
    assert result["objective"] == "latency"
    assert result["paths"] == dict(Counter(layer.path for layer in loaded.values()))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("path", "convolutions"), [("chain", 3), ("12|3", 2), ("rebuilt", 1)])
def test_an_exported_file_computes_as_the_path_says(tmp_path, bits, path, convolutions):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)).eval()
    small = tspc.compress(model, "tk", 0.5, bits=bits, allocation="uniform", include=["1"], keep_first=False).eval()
    small[1].path = path
    tspc.export(small, tmp_path / "small.pt2", torch.randn(2, 8, 9, 9))
    graph = torch.export.load(tmp_path / "small.pt2").graph
    assert sum("conv2d" in str(node.target) for node in graph.nodes) == 2 + convolutions
