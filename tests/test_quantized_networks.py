"""Networks with factors in few bits: number formats, states, damaged files, kernels of any kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tspc
from tspc.compression.integers import ENTRY, on_grids, state_bytes
from tspc.compression.planning import plan
from tspc.errors import ConfigError, WeightsError
from tspc.models.safe_files import read_tensors, write_tensors


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)
    rest = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)
    return nn.Sequential(*convolutions, *rest).eval().to(dtype)


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(32, 8, 10, 10, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_file_keeps_every_number_format(tmp_path, dtype, bits):
    small = tspc.compress(network(dtype), "svd", 0.6, bits=bits).eval()
    tspc.save(small, tmp_path / "a.safetensors")
    loaded = tspc.load(tmp_path / "a.safetensors", network())
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(images(dtype)), small(images(dtype)))
    narrow = tspc.compress(network(), "svd", 0.6, bits=bits).eval().to(dtype)
    tspc.save(narrow, tmp_path / "b.safetensors")
    assert torch.equal(tspc.load(tmp_path / "b.safetensors", network())(images(dtype)), narrow(images(dtype)))


def test_a_network_of_float64_fits_into_the_size_too():
    small = tspc.compress(network(torch.float64), "svd", size="9kB")
    assert 6000 < state_bytes(small) <= 9000


def test_half_keeps_small_rows():
    model = network()
    with torch.no_grad():
        model[2].weight[3].mul_(1e-5)
    small = tspc.compress(model, "dense", bits=16).half()
    assert small(images(torch.float16)).isfinite().all()
    torch.testing.assert_close(small(images(torch.float16)).float(), model(images()), rtol=0.05, atol=0.01)


def test_a_state_holds_the_scales():
    one, other = (
        tspc.compress(network(), "svd", 0.6, bits=4, allocation="uniform", calibration=data).eval()
        for data in (images(), 5 * images())
    )
    assert not torch.equal(other(images()), one(images()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(images()), one(images()))


@pytest.mark.parametrize("method", ["tk", "cp", "svd"])
@pytest.mark.parametrize("options", [{"bits": 4, "rate": 0.3, "allocation": "uniform"}, {"size": 0.3}])
def test_kernels_of_zeros(method, options):
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()
    small = tspc.compress(model, method, calibration=images(), **options)
    assert small(images()).isfinite().all()


def test_the_error_that_is_expected_counts_the_rounding():
    made = plan(network(), "tt", 0.9, bits=3, calibration=images())
    rounded = [row for row in made.budgeted if row.method is not None and row.method.name == "dense"]
    assert rounded
    assert all(row.output_error > 0.01 for row in rounded)
    with pytest.raises(ConfigError, match=r"target_error=0.001 cannot be met: .*; use more bits"):
        plan(network(), "tt", target_error=0.001, bits=3, calibration=images())


def test_layers_that_would_be_slower_keep_their_whole_kernel_in_few_bits():
    found = []
    for size in (0.2, 0.15, 0.12, 0.11, 0.1):
        made = plan(network(), "svd", size=size, objective="latency", calibration=images())
        assert made.rate_reached <= size
        found += [row for row in made.budgeted if row.reason is not None]
    assert found
    assert all(row.bits < 32 for row in found)


def test_channels_of_a_depthwise_layer_have_scales_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1)).eval()
    with torch.no_grad():
        model[1].weight.mul_((1.5 * torch.randn(32)).exp()[:, None, None, None])
    small = tspc.compress(model, "dense", bits=8, keep_last=False)
    assert (small(images()) - model(images())).norm() < 0.02 * model(images()).norm()


@pytest.mark.parametrize("damage", ["short", "missing", "shape", "scales", "dtype"])
def test_damaged_integers_are_one_clear_error(tmp_path, damage):
    path = tmp_path / "small.safetensors"
    tspc.save(tspc.compress(network(), "svd", 0.6, bits=4), path)
    file = read_tensors(path)
    name = next(name for name in file.tensors if name.endswith(ENTRY))
    state, header = dict(file.tensors), str(file.header)
    if damage == "short":
        state[name] = state[name][:-1].clone()
    elif damage == "missing":
        del state[name]
    elif damage == "shape":
        state[name] = state[name][None].clone()
    elif damage == "scales":
        state[name] = state[name].clone()
        state[name][:4] = torch.tensor([0x7F80], dtype=torch.int32).to(torch.int16).repeat(2).view(torch.uint8)
    else:
        header = header.replace('"dtype": "float32"', '"dtype": "complex64"')
    write_tensors(path, state, header)
    model = network()
    before = model(images())
    with pytest.raises(WeightsError, match="integers of layer|more numbers than the file holds"):
        tspc.load(path, model)
    assert torch.equal(model(images()), before)
    assert not on_grids(model)


def test_values_that_no_integer_can_be_are_not_saved(tmp_path):
    small = tspc.compress(network(), "svd", 0.6, bits=4)
    with torch.no_grad():
        next(iter(on_grids(small).values())).factor_parameters()[0].fill_(torch.nan)
    with pytest.raises(WeightsError, match="NaN or infinite"):
        tspc.save(small, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_trained_network_is_the_one_that_is_saved(tmp_path):
    small = tspc.compress(network(), "cp", size=0.3, calibration=images()).train()
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        small(images()).square().mean().backward()
        optimizer.step()
    tspc.save(small.eval(), tmp_path / "small.safetensors")
    assert torch.equal(tspc.load(tmp_path / "small.safetensors", network())(images()), small(images()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_the_tracer_of_torchscript_takes_factors_on_grids():
    small = tspc.compress(network(), "svd", 0.6, bits=4).eval()
    traced = torch.jit.trace(small, images()[:2])
    torch.testing.assert_close(traced(images()), small(images()))
