"""`id`: the kernels of `svd` with fewer numbers, in layers, files and few bits."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import tspc
from tspc.compression.header import FORMAT_OF_BASES
from tspc.compression.integers import state_bytes
from tspc.decompositions.interpolative import LARGEST, ZERO, Interpolative, basis_of
from tspc.decompositions.laws import kernel, relative
from tspc.errors import WeightsError
from tspc.layers.forms import tensorize, tensorized_layers, untrained
from tspc.layers.learning import after_training_, for_training_
from tspc.models.safe_files import read_tensors, write_tensors

METHOD = Interpolative()
SHAPES = [(8, 16, 3, 5), (12, 9), (16, 16), (9, 12, 1, 1), (5, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_that_of_svd(shape):
    k = kernel(shape)
    for rank in (1, METHOD.max_rank(shape)[0] // 2, METHOD.max_rank(shape)[0]):
        ours, theirs = METHOD.decompose(k, (rank,)), tspc.SVD().decompose(k, (rank,))
        assert relative(METHOD.reconstruct(ours), tspc.SVD().reconstruct(theirs)) < 1e-12
        numbers = sum(t.numel() for t in theirs.tensors) - rank**2
        assert sum(t.numel() for t in ours.tensors) == numbers
        rows = shape[1] * (1 if len(shape) == 2 else shape[2])
        assert METHOD.num_params(shape, (rank,)) == numbers + math.ceil((math.ceil(rows / 8) + 1) / 4)
        assert ours.basis is not None
        assert ours.basis.numel() == math.ceil(rows / 8) + 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_rows_of_the_basis_are_an_identity_and_the_others_small(shape, size):
    rank = METHOD.max_rank(shape)[0] // 2
    factors = METHOD.decompose(size * kernel(shape), (rank,))
    first = METHOD.tensors_of(factors)[0].flatten(1)
    free = METHOD.free_columns(factors)
    scale = float(first[:, ~free].max())
    assert torch.equal(first[:, ~free], scale * torch.eye(rank, dtype=first.dtype))
    assert math.log2(scale).is_integer()
    assert torch.equal(first[:, free], factors.tensors[0])
    assert float(factors.tensors[0].abs().max()) <= LARGEST * scale
    ratio = first.square().mean() / factors.tensors[1].square().mean()
    assert 0.25 <= float(ratio) <= 4, "both links have entries of about one size"


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-5])
def test_dead_inputs_leave_factors_of_usual_size(size):
    """The rank leaves out as many inputs as are dead: beside the identity is noise, which has no say in its size."""
    dense = nn.Linear(16, 32)
    with torch.no_grad():
        dense.weight[:, [1, 4, 7, 10]] *= size
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    layer = tensorize(dense, METHOD, (12,)).eval()
    assert abs(int(layer.basis[-1]) - ZERO) <= 4
    wanted = dense(x).detach()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(layer).half()(x.half()).float(), wanted, rtol=2e-2, atol=2e-2)
    optimizer = torch.optim.Adam(layer.train().parameters(), 1e-4)
    layer(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [1e-150, 1e-90, 1e90])
def test_a_kernel_of_extreme_size(size):
    k = size * kernel((12, 20))
    assert relative(METHOD.reconstruct(METHOD.decompose(k, (12,))) / size, k / size) < 1e-9


def test_a_basis_among_rows_of_zeros_and_of_multiples():
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.0, 3.0], [2.0, 0.0]], dtype=torch.float64)
    chosen, coefficients = basis_of(rows)
    torch.testing.assert_close(coefficients @ rows[chosen], rows)
    assert torch.equal(coefficients[chosen], torch.eye(2, dtype=torch.float64))
    assert float(coefficients.abs().max()) <= LARGEST
    assert chosen.tolist() == sorted(chosen.tolist())
    chosen, coefficients = basis_of(rows[:3])  # of rank one
    torch.testing.assert_close(coefficients @ rows[chosen], rows[:3])


def test_an_ill_conditioned_matrix_keeps_its_digits():
    rows = kernel((200, 40)) * torch.logspace(0, -10, 40, dtype=torch.float64)
    chosen, coefficients = basis_of(rows)
    assert relative(coefficients @ rows[chosen], rows) < 1e-12
    assert float(coefficients.abs().max()) <= LARGEST


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(24, 20, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 40), nn.ReLU(), nn.Linear(40, 10),
    ).eval()  # fmt: skip


IMAGES = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def small(method: str = "id", rate: float | None = 0.5, **more) -> nn.Module:
    return tspc.compress(network(), method, rate, calibration=IMAGES, **more).eval()


@pytest.mark.parametrize(("rate", "share"), [(0.5, 0.95), (0.9, 0.7)])
def test_at_equal_parameters_it_is_nearer_to_the_original_than_svd(rate, share):
    ours, theirs = (small(method, rate) for method in ("id", "svd"))
    with torch.no_grad():
        wanted = network()(IMAGES)
        assert relative(ours(IMAGES), wanted) < share * relative(theirs(IMAGES), wanted)
    plan = tspc.plan(network(), "id", rate, calibration=IMAGES)
    words = sum(math.ceil(layer.basis.numel() / 4) for layer in tensorized_layers(ours).values())
    assert sum(p.numel() for p in ours.parameters()) + words == plan.network_params
    assert 0.95 * rate < plan.rate_reached <= rate


@pytest.mark.parametrize("bits", ["32", "8", "4"])
def test_files(bits, tmp_path):
    model, path = small(bits=bits), tmp_path / "a.safetensors"
    tspc.save(model, path)
    loaded = tspc.load(path, network()).eval()
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert json.loads(read_tensors(path, tensors=False).header or "")["format"] == FORMAT_OF_BASES
    saved = sum(t.numel() * t.element_size() for t in read_tensors(path, tensors=True).tensors.values())
    assert saved == state_bytes(model)
    assert saved == tspc.plan(network(), "id", 0.5, calibration=IMAGES, bits=bits).network_bytes


@pytest.mark.parametrize("damage", ["count", "missing", "size", "kind", "exponent"])
def test_a_damaged_basis_is_refused(damage, tmp_path):
    path, name = tmp_path / "a.safetensors", "2.basis"
    tspc.save(small(), path)
    file = read_tensors(path, tensors=True)
    basis = file.tensors.pop(name)
    if damage == "count":
        file.tensors[name] = basis | 3 if int(basis[0]) & 3 != 3 else basis & 252
    elif damage == "exponent":
        file.tensors[name] = torch.cat([basis[:-1], basis.new_tensor([255])])
    elif damage == "size":
        file.tensors[name] = basis[:-1].clone()
    elif damage == "kind":
        file.tensors[name] = basis.float()
    write_tensors(path, file.tensors, file.header)
    before = network()
    state = copy.deepcopy(before.state_dict())
    with pytest.raises(WeightsError, match=r"2\.basis|the basis of layer 2 is damaged"):
        tspc.load(path, before)
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())


def test_a_state_with_another_number_of_rows_is_refused():
    model = small()
    state = copy.deepcopy(model.state_dict())
    state["2.basis"][0] ^= 1
    with pytest.raises(WeightsError, match="the basis of a layer"):
        model.load_state_dict(state)


def test_training_and_other_precisions_leave_the_basis():
    model = small().train()
    bases = {name: layer.basis.clone() for name, layer in tensorized_layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    loss = model(IMAGES).square().mean()
    loss.backward()
    optimizer.step()
    assert float(model(IMAGES).square().mean().detach()) < float(loss.detach())
    model.half()
    assert all(torch.equal(layer.basis, bases[name]) for name, layer in tensorized_layers(model).items())


def test_a_network_learns_in_the_factors_of_svd():
    """They have as many numbers as `svd`, orthogonal rows, and the network computes the same before and after."""
    model = small()
    with torch.no_grad():
        wanted, names = model(IMAGES), list(model.state_dict())
        methods = for_training_(model)
        torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-5, atol=1e-6)
        for name, layer in tensorized_layers(model).items():
            assert (methods[name], layer.decomposition, layer.factors().basis) == (METHOD, tspc.SVD(), None)
            first, last = (factor.double() for factor in layer.factor_tensors())
            for gram in (first.flatten(1) @ first.flatten(1).T, torch.einsum("trhw,tqhw->rq", *[_four(last)] * 2)):
                assert relative(torch.diag(gram.diagonal()), gram) < 1e-5
            assert all(factor.requires_grad for factor in layer.factor_parameters())
        after_training_(model, methods)
        torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names
    assert not for_training_(small("svd"))
    assert not for_training_(small(bits="4")), "factors on grids stay there"


def _four(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(*tensor.shape, *(1,) * (4 - tensor.ndim))


def test_a_layer_without_factors_yet_has_a_valid_basis():
    layer = untrained(nn.Linear(20, 12), METHOD, (5,))
    for factor in layer.factor_parameters():
        nn.init.ones_(factor)
    assert torch.equal(layer.weight, torch.tensor([1.0] * 5 + [5.0] * 15).expand(12, 20))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_exported_files_hold_the_factors_alone(format, tmp_path):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(432, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    path, sizes = tmp_path / f"a.{format}", []
    for method in (METHOD, tspc.SVD()):
        made = copy.deepcopy(wide)
        made[1] = tensorize(made[1], method, (200,))
        tspc.export(made.eval(), path, IMAGES[:2])
        sizes.append(path.stat().st_size)
    assert sizes[0] < sizes[1] - 0.8 * 4 * 200**2
