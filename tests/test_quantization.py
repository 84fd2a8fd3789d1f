"""Factors in few bits: grids, packing, rounding with error feedback, and layers that compute with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tspc
from tests.methods import TABLE
from tspc.compression.integers import on_grids, state_bytes
from tspc.decompositions import Metric, resolve
from tspc.layers.forms import tensorize, tensorized_layers
from tspc.quantization.factors import nearest, quantized
from tspc.quantization.grids import BITS, FULL, Grid, factor_bytes, grid_for
from tspc.quantization.packing import packed, unpacked
from tspc.quantization.rounding import with_feedback

NARROW = [bits for bits in BITS if bits != FULL]


def metric_of(n: int, outputs: int = 0) -> Metric:
    """A norm in which some inputs matter much more than others, and inputs depend on each other."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(n, n, generator=generator) * torch.linspace(0.02, 1, n)
    inputs = (mixing @ mixing.T / n + 1e-3 * torch.eye(n)).double()
    rows = torch.randn(outputs, outputs, generator=generator).double()
    return Metric(inputs, rows @ rows.T / outputs + 0.1 * torch.eye(outputs).double() if outputs else None)


def kernel_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", NARROW)
def test_integers_are_packed_without_gaps(bits):
    most = 2 ** (bits - 1) - 1
    integers = torch.randint(-most, most + 1, (37,), generator=torch.Generator().manual_seed(0))
    integers[:2] = torch.tensor([-most, most])
    data = packed(integers, bits)
    assert data.dtype == torch.uint8
    assert len(data) == -(-37 * bits // 8)
    assert torch.equal(unpacked(data, bits, 37).long(), integers)


@pytest.mark.parametrize("bits", NARROW)
def test_values_lie_on_the_grid_of_their_row(bits):
    factor = kernel_of(5, 16) * torch.tensor([1e-4, 1.0, 3.0, 100.0, 0.0])[:, None]
    grid = grid_for(factor, bits)
    rounded = grid.rounded(factor)
    steps = rounded / grid.scales[:, None]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.abs().max() <= grid.largest
    assert torch.equal(grid.scales, grid.scales.bfloat16().float()), "a file holds scales in bfloat16"
    assert torch.equal(grid.rounded(rounded), rounded)
    # Not clipped, an error is at most half a step.
    inside = factor.abs() <= grid.largest * grid.scales[:, None]
    assert ((rounded - factor).abs() <= grid.scales[:, None] * 0.5001)[inside].all()


def test_a_grid_clips_where_that_loses_less():
    row = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([4.0])])[None]
    clipped = (grid_for(row, 4).rounded(row) - row).square().sum()
    whole = Grid(4, row.abs().amax(1) / 7)
    assert clipped < (whole.rounded(row) - row).square().sum()


def test_short_rows_share_one_scale():
    assert grid_for(kernel_of(8, 1, 3, 1), 8).scales.shape == (1,)
    assert factor_bytes((8, 1, 3, 1), 8) == 24 + 2
    assert factor_bytes((8, 16), 4) == 64 + 16
    assert factor_bytes((8, 16), 32) == 512


@pytest.mark.parametrize("by_rows", [False, True])
def test_error_feedback_loses_much_less_than_rounding_to_nearest(by_rows):
    matrix, moments = kernel_of(12, 40), metric_of(40).inputs.float()
    grid = grid_for(matrix, 4)
    found = with_feedback(matrix, grid, moments.expand(12, 40, 40) if by_rows else moments)
    assert torch.equal(grid.rounded(found), found)
    lost = lambda q: (((q - matrix) @ moments) * (q - matrix)).sum(1)  # noqa: E731
    assert (lost(found) <= lost(grid.rounded(matrix))).all()
    assert lost(found).sum() < 0.6 * lost(grid.rounded(matrix)).sum()


def test_error_feedback_comes_near_to_the_best_of_all_roundings():
    matrix, moments = kernel_of(1, 6), metric_of(6).inputs.float()
    grid = Grid(3, torch.tensor([0.5]))
    lost = lambda q: float((((q - matrix) @ moments) * (q - matrix)).sum())  # noqa: E731
    steps = torch.cartesian_prod(*[torch.arange(-3.0, 4.0)] * 6) * 0.5
    best = min(lost(row[None]) for row in steps[((steps - matrix).abs() < 1.01).all(1)])
    assert best <= lost(with_feedback(matrix, grid, moments)) <= lost(grid.rounded(matrix))


@pytest.mark.parametrize("moments", [torch.zeros(6, 6), torch.full((6, 6), torch.nan), torch.ones(6, 6)])
def test_moments_of_any_kind_give_values_on_the_grid(moments):
    matrix = kernel_of(3, 6)
    grid = grid_for(matrix, 4)
    found = with_feedback(matrix, grid, moments)
    assert found.isfinite().all()
    assert torch.equal(grid.rounded(found), found)


@pytest.mark.parametrize("name", [*TABLE, "dense"])
@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (12, 20)])
def test_factors_are_never_worse_than_rounded_to_nearest(name, shape):
    kernel, method = kernel_of(*shape), resolve(name).for_shape(shape)
    metric = metric_of(kernel[0].numel(), shape[0])
    factors = method.decompose(kernel, method.rank_for(shape, kernel.numel()), metric)
    error = lambda of: metric.squared((kernel - method.reconstruct(of.factors)).flatten(1))  # noqa: E731
    for bits in (8, 5, 4, 3):
        plain, found = nearest(factors, bits), quantized(method, factors, kernel, bits, metric)
        assert error(found) <= error(plain)
        for grid, tensor in zip(found.grids, found.factors.tensors, strict=True):
            torch.testing.assert_close(grid.rounded(tensor), tensor, rtol=1e-6, atol=0)


CHAINS = [(name, 0.8) for name in ("svd", "cp", "tk", "tt", "id")]


@pytest.mark.parametrize(("name", "share"), [*CHAINS, ("dense", 0.4)])
def test_links_of_a_chain_make_up_for_each_other(name, share):
    shape = (16, 16, 3, 3)
    kernel, method, metric = kernel_of(*shape), resolve(name), metric_of(144)
    factors = method.decompose(kernel, method.rank_for(shape, kernel.numel()), metric)
    error = lambda of: metric.squared((kernel - method.reconstruct(of)).flatten(1))  # noqa: E731
    plain = error(nearest(factors, 4).factors) - error(factors)
    assert error(quantized(method, factors, kernel, 4, metric).factors) - error(factors) < share * plain


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["svd", "cp", "rcp", "dense"])
@pytest.mark.parametrize("dense", [nn.Conv2d(8, 12, 3), nn.Linear(24, 20), nn.Conv1d(8, 12, 5)])
def test_a_layer_computes_with_values_on_its_grids(name, dense):
    dense = dense.eval()
    shape = tuple(dense.weight.unsqueeze(2).shape) if isinstance(dense, nn.Conv1d) else tuple(dense.weight.shape)
    method = resolve(name).for_shape(shape)
    layer = tensorize(dense, method, method.rank_for(shape, dense.weight.numel()), bits=4)
    x = torch.randn(2, *((24,) if dense.weight.ndim == 2 else (8,) + (9,) * (dense.weight.ndim - 2)))
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer.train()(x), expected) or torch.allclose(layer(x), expected, atol=1e-6)
        for factor, own in zip(layer.factors().tensors, layer.factor_tensors(), strict=True):
            torch.testing.assert_close(factor, own)
        layer.factor_parameters()[0].add_(1e-6)  # less than half a step
        torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.factor_parameters())


@pytest.mark.parametrize("bits", [8, 5, 4])
@pytest.mark.parametrize("method", ["svd", "rtt", "dense"])
def test_a_file_holds_integers_and_the_loaded_network_is_the_same(tmp_path, bits, method):
    images = torch.randn(32, 3, 14, 14)
    options = {} if method == "dense" else {"rate": 0.6}
    small = tspc.compress(convolutional(), method, calibration=images, bits=bits, **options).eval()
    assert {layer.bits for layer in tensorized_layers(small).values()} == {bits}
    assert len(on_grids(small)) == 5, "also the layers that stay dense"
    path = tmp_path / "small.safetensors"
    tspc.save(small, path)
    loaded = tspc.load(path, convolutional())
    for one, other in zip(small.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    assert torch.equal(loaded(images), small(images))
    expected = sum(
        factor_bytes(tuple(factor.shape), bits)
        for layer in on_grids(small).values()
        for factor in layer.factor_tensors()
    )
    rest = {name for name in small.state_dict() if not any(name.startswith(f"{layer}.") for layer in on_grids(small))}
    biases = {f"{name}.bias" for name, layer in on_grids(small).items() if layer.bias is not None}
    vectors = [name for name in small.state_dict() if name in rest or name.endswith("bias")]
    others = [small.state_dict()[name] for name in vectors if "running_" not in name and "num_batches" not in name]
    assert biases
    statistics = sum(value.numel() for name, value in small.state_dict().items() if "running_" in name)
    assert state_bytes(small) == expected + statistics + sum(2 * value.numel() for value in others)
    assert path.stat().st_size < state_bytes(small) + 6000  # names and shapes


def test_eight_bits_hardly_change_the_answer():
    images, model = torch.randn(64, 3, 14, 14), convolutional()
    small = tspc.compress(model, "dense", calibration=images, bits=8)
    wanted = model(images)
    assert (small(images) - wanted).norm() < 0.02 * (wanted - wanted.mean(0)).norm()
    assert state_bytes(small) < 0.4 * state_bytes(model)


@pytest.mark.parametrize("method", ["cp", "rtk", "dense"])
def test_an_exported_file_holds_the_values_that_the_network_computes_with(tmp_path, method):
    images = torch.randn(4, 3, 14, 14)
    options = {} if method == "dense" else {"rate": 0.6}
    small = tspc.compress(convolutional(), method, calibration=images, bits=4, **options).eval()
    for layer in tensorized_layers(small).values():
        layer.path = layer.paths[0]  # the longest chain
    found = tspc.export(small, tmp_path / "small.pt2", images)
    assert {layer.bits for layer in tensorized_layers(small).values()} == {4}, "the network itself is not changed"
    program = torch.export.load(tmp_path / "small.pt2")
    torch.testing.assert_close(program.module()(images), small(images), rtol=1e-4, atol=1e-5)
    assert not any("round" in str(node.target) for node in program.graph.nodes)
    assert found is not None
