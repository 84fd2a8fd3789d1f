"""Biases and norms beside factors on grids: 16 bits for a number, and batch norms without statistics."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tspc
from tspc.compression.beside import ENTRY, STATISTICS, bytes_saved, narrow_beside_, state_saved
from tspc.compression.checkpoint import read_header
from tspc.compression.integers import state_bytes
from tspc.errors import WeightsError
from tspc.models.safe_files import read_tensors, write_tensors


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32, eps=1e-3),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
        nn.LayerNorm(10),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model(3 * torch.randn(16, 3, 10, 10) + 1)
    return model.eval()


IMAGES = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def small(**options) -> nn.Module:
    return tspc.compress(network(), "svd", calibration=IMAGES, **options).eval()


def test_narrow_beside_give_the_same_answers_and_are_float16_numbers():
    model = network()
    with torch.no_grad():
        wanted = model(IMAGES)
        narrow_beside_(model)
        assert torch.allclose(model(IMAGES), wanted, atol=5e-3 * float(wanted.std()), rtol=0)
    for name, value in model.state_dict().items():
        if value.ndim == 1 and "running" not in name:
            assert value.dtype == torch.float32
            is_kept = name in ("3.bias", "6.bias", "8.bias")  # of kernels that are no integers
            assert torch.equal(value.half().float(), value) != is_kept, name
    for norm, other in zip((model[1], model[4]), (network()[1], network()[4]), strict=True):
        deviation = other.running_var.sqrt()
        assert torch.allclose(norm.running_var.sqrt(), deviation, rtol=0.13), "near enough for further training"
        assert torch.allclose(norm.running_mean, other.running_mean, rtol=0.07, atol=0.002 * float(deviation.max()))
        assert not torch.equal(norm.running_var, other.running_var)
        assert norm.num_batches_tracked == 0


def test_a_channel_without_variance_stays_finite():
    model = network()
    with torch.no_grad():
        model[1].running_var[2] = 0.0
        model[1].running_mean[2] = -3.0
        model[0].weight[2] = 0.0
        wanted = model(IMAGES)
        narrow_beside_(model)
        assert torch.allclose(model(IMAGES), wanted, atol=5e-3 * float(wanted.std()), rtol=0)


def test_further_training_starts_from_sound_statistics():
    """A few steps hardly move the running statistics from where they were."""
    x = 3 * torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(2)) + 1

    def change(model: nn.Module) -> float:
        with torch.no_grad():
            model.train()(x)
            return float(torch.nn.functional.mse_loss(model.eval()(x), network()(x)))

    model = network()
    narrow_beside_(model)
    assert change(model) < 1.5 * change(network())


def test_narrowing_twice_changes_nothing_more():
    model = network()
    narrow_beside_(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow_beside_(model)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=2**-10, atol=0), name


def test_tensors_that_float16_cannot_hold_are_left_alone():
    model = network()
    with torch.no_grad():
        model[1].weight[3] = 1e7
        model[6].bias[0] = 1e6
        before = {name: value.clone() for name, value in model.state_dict().items()}
        wanted = model(IMAGES)
        narrow_beside_(model)
        for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var", "6.bias"):
            kept = torch.allclose(model.state_dict()[name], before[name], rtol=1e-3, atol=1e-6)
            assert kept, name
        assert torch.isfinite(model(IMAGES)).all()
        assert torch.allclose(model(IMAGES), wanted, rtol=1e-2, atol=1e-2)


def test_without_few_bits_nothing_is_narrow(tmp_path):
    model = small(rate=0.4)
    assert model[1].running_mean.any()
    tspc.save(model, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert "vectors" not in header
    assert header["format"] == 1


def test_a_file_has_one_entry_for_all_float16_numbers_and_one_for_all_statistics(tmp_path):
    model, path = small(size=0.2), tmp_path / "a.safetensors"
    tspc.save(model, path)
    file = read_tensors(path)
    assert file.tensors[ENTRY].dtype == torch.float16
    assert file.tensors[STATISTICS].dtype == torch.uint8
    assert not any("running" in name or "num_batches" in name for name in file.names)
    assert sum(x.numel() * x.element_size() for x in file.tensors.values()) == state_bytes(model)
    loaded = tspc.load(path, network())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_header_holds_each_method_once(tmp_path):
    path = tmp_path / "a.safetensors"
    tspc.save(small(size=0.2), path)
    raw = json.loads(read_tensors(path).header)
    names = [method["name"] for method in raw["methods"]]
    assert len(names) == len(set(names)) <= 2
    header = read_header(path)
    assert {layer["method"]["name"] for layer in header["layers"].values()} == set(names)
    raw["layers"]["0"]["method"] = 7
    write_tensors(path, read_tensors(path).tensors, json.dumps(raw))
    with pytest.raises(WeightsError, match=r"layers\.0\.method is 7, expected a place"):
        tspc.load(path, network())


def test_the_plan_knows_the_size_of_the_file():
    made = tspc.plan(network(), "svd", size=0.25, calibration=IMAGES)
    model = small(size=0.25)
    assert made.network_bytes == state_bytes(model)
    assert made.network_bytes <= 0.25 * state_bytes(network())


def test_what_is_saved_is_what_was_foreseen():
    model = network()
    layers = [module for module in model if isinstance(module, nn.Conv2d | nn.Linear)]
    foreseen = bytes_saved(model, layers)
    narrow_beside_(model)
    assert foreseen == state_saved(model) > 0


def test_a_narrow_network_that_is_trained_is_saved_exactly(tmp_path):
    model = small(size=0.3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(IMAGES).square().sum().backward()
    optimizer.step()
    model.eval()
    tspc.save(model, tmp_path / "a.safetensors")
    loaded = tspc.load(tmp_path / "a.safetensors", network())
    for name in ("1.running_mean", "1.running_var", "1.weight", "1.num_batches_tracked", "4.bias"):
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name]), name


@pytest.mark.parametrize(
    "damage", ["shorter", "missing", "unknown", "matrix", "norms", "statistics", "infinite", "shapes", "sizes"]
)
def test_damaged_numbers_are_refused_with_one_clear_error(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    tspc.save(small(size=0.3), path)
    file, header = read_tensors(path), json.loads(read_tensors(path).header)
    tensors = dict(file.tensors)
    if damage == "shorter":
        tensors[ENTRY] = tensors[ENTRY][:-1].clone()
    elif damage == "missing":
        del tensors[ENTRY]
    elif damage == "unknown":
        header["vectors"][0] = "none.weight"
    elif damage == "matrix":
        header["vectors"][0] = "8.weight"
    elif damage == "shapes":
        header["shapes"].pop()
    elif damage == "sizes":
        header["shapes"][0][0] += 1
    elif damage == "statistics":
        tensors[STATISTICS] = tensors[STATISTICS].float()
    elif damage == "infinite":
        tensors[STATISTICS] = torch.full_like(tensors[STATISTICS], 0x7F)
    else:
        header["norms"] = ["0"]
    write_tensors(path, tensors, json.dumps(header))
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match="float16 numbers|does not fit") as raised:
        tspc.load(path, model)
    assert str(path) in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("mean", "deviation"), [(5.0, 0.0), (100.0, 1e-3), (2015.0, 3.0), (-1000.0, 0.05), (0.3, 1.0)])
def test_features_that_hardly_vary_keep_their_answers(mean, deviation):
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.running_mean[0], norm.running_var[0] = mean, deviation**2
        norm.weight[:] = torch.tensor([1.0, 2.0, 0.5])
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([deviation, 1.0, 1.0])
    x[:, 0] += mean
    model = nn.Sequential(norm).eval()
    with torch.no_grad():
        wanted = model(x)
        narrow_beside_(model)
        assert ((model(x) - wanted).abs().amax(0) < 4e-3 * (1 + wanted.std(0))).all()


def test_norms_that_share_a_tensor_or_do_something_else_keep_their_statistics():
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, 1 + self.weight, self.bias)

    tied, other, odd = nn.BatchNorm2d(4), nn.BatchNorm2d(4), Shifted(4)
    other.weight = tied.weight
    average = nn.BatchNorm2d(4, momentum=None)
    bare = nn.BatchNorm2d(4)
    bare.register_buffer("num_batches_tracked", None)
    no_scale = nn.BatchNorm2d(4)
    no_scale.weight = None
    norms = tied, other, odd, average, bare, no_scale, nn.BatchNorm2d(4, affine=False)
    model = nn.Sequential(*norms, *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    x = 2 * torch.randn(32, 4, 6, 6, generator=torch.Generator().manual_seed(0)) + 1
    model(x)
    model.eval()
    before = [norm.running_var.clone() for norm in model[:7]]
    with torch.no_grad():
        wanted = model(x)
        narrow_beside_(model)
        assert (model(x) - wanted).norm() < 1e-3 * wanted.norm()
    assert all(torch.equal(norm.running_var, value) for norm, value in zip(model[:7], before, strict=True))
    tspc.compress(model, "dense", bits=8)


@pytest.mark.parametrize("bias", [1e6, 1e-9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_size_is_kept_with_biases_of_any_size(bias, dtype):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(dtype)
    with torch.no_grad():
        model[2].bias.fill_(bias)
    for size in (6200, 9000):
        small = tspc.compress(model, "svd", size=f"{size}B")
        assert state_bytes(small) <= size
        assert tspc.plan(model, "svd", size=f"{size}B").network_bytes == state_bytes(small)


def test_layers_that_are_left_out_keep_their_biases():
    made = tspc.compress(network(), "svd", size=0.5, exclude=["3"])
    assert torch.equal(made[3].bias, network()[3].bias)
    assert tspc.plan(network(), "svd", size=0.5, exclude=["3"]).network_bytes == state_bytes(made)


def test_a_plan_needs_no_values():
    with torch.device("meta"):
        model = network()
    made = tspc.plan(model, "svd", rate=0.3, allocation="uniform", bits=8)
    assert made.network_bytes == tspc.plan(network(), "svd", rate=0.3, allocation="uniform", bits=8).network_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_file_fits_an_architecture_of_another_number_format(tmp_path, dtype):
    made = small(size=0.3)
    tspc.save(made, tmp_path / "a.safetensors")
    loaded = tspc.load(tmp_path / "a.safetensors", network().to(dtype))
    assert torch.equal(loaded(IMAGES), made(IMAGES))


@pytest.mark.parametrize("name", ["vectors", "statistics"])
def test_an_entry_of_the_networks_own_keeps_its_name(tmp_path, name):
    def own() -> nn.Module:
        model = network()
        model.register_buffer(name, torch.arange(6.0).reshape(2, 3) / 7)
        return model

    made = tspc.compress(own(), "svd", size=0.3)
    tspc.save(made, tmp_path / "a.safetensors")
    assert torch.equal(getattr(tspc.load(tmp_path / "a.safetensors", own()), name), getattr(made, name))
