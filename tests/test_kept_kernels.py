"""Kernels kept in eval mode never lag behind their factors; tensorized networks in the rest of PyTorch's machinery."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.methods import FAMILIES
from tests.nets import a_layer, dense_answer, images, small_net
from tspc.decompositions import METHODS
from tspc.layers.chains import REBUILT

each_method = pytest.mark.parametrize("name", METHODS)

# --- kernels kept in eval mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rcp", "rtk", "rtt", "tt"])
def test_kernels_are_contracted_once_in_eval_mode(name, monkeypatch):
    layer = a_layer(name, REBUILT)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = layer(x)
        monkeypatch.setattr(layer, "_contract", None)  # to contract again would fail
        assert torch.equal(layer(x), before)
    assert all(not any(kept is p for kept in layer.state_dict().values()) for p in layer._kept)
    layer.requires_grad_(False)
    layer(x)  # nothing asks for a gradient, so the kept kernel serves without no_grad too
    monkeypatch.undo()
    layer.requires_grad_(True)
    assert layer(x).requires_grad


CHANGES = {
    "in place": lambda layer: layer.factor_list[0].mul_(2),
    "data": lambda layer: setattr(layer.factor_list[0], "data", layer.factor_list[0].data * 2),
    "optimizer": lambda layer: torch.optim.SGD(layer.parameters(), 0.1).step(),
    "load_state_dict": lambda layer: layer.load_state_dict(doubled(layer)),
    "assign": lambda layer: layer.load_state_dict(doubled(layer), assign=True),
    "replaced": lambda layer: layer.factor_list.__setitem__(0, nn.Parameter(layer.factor_list[0] * 2)),
}


def doubled(layer):
    return {key: value * 2 for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_kernels_follow_the_factors(change):
    layer, x = a_layer(), torch.randn(1, 8, 6, 6)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        torch.testing.assert_close(layer(x), dense_answer(layer, x))
        assert not torch.allclose(layer(x), before)


def test_a_pickle_holds_the_factors_alone():
    layer, x = a_layer(), torch.randn(1, 8, 6, 6)
    assert layer.kept
    data = pickle.dumps(layer)
    assert len(data) <= len(pickle.dumps(a_layer().train()))
    with torch.no_grad():
        torch.testing.assert_close(pickle.loads(data)(x), layer(x))
    layer.forget()
    assert not layer.kept


def test_kept_kernels_follow_the_dtype_and_come_back_after_training():
    layer = a_layer()
    with torch.no_grad():
        assert layer.double()(torch.randn(1, 8, 6, 6).double()).dtype == torch.float64
        assert layer.train()._kept is None
        assert layer.eval()._kept is not None


def test_kept_in_inference_mode_used_outside():
    layer, x = a_layer(), torch.randn(1, 8, 6, 6)
    with torch.inference_mode():
        layer.factor_list[0].mul_(2)
        layer(x)
    x.requires_grad_()
    layer.requires_grad_(False)(x).sum().backward()
    torch.testing.assert_close(layer(x), dense_answer(layer, x))


def test_under_function_transforms():
    layer, x = a_layer(), torch.randn(1, 8, 6, 6)
    stacked = {key: torch.stack([value, 2 * value]) for key, value in layer.state_dict().items()}
    with torch.no_grad():
        both = torch.func.vmap(lambda state: torch.func.functional_call(layer, state, (x,)))(stacked)
        torch.testing.assert_close(both[0], layer(x))


# --- other machinery of PyTorch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_deepcopy_pickle_channels_last_autocast(name):
    small, x = small_net(name), images()
    with torch.no_grad():
        wanted = small(x)
        for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(twin(x), wanted)
        last = copy.deepcopy(small).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), wanted, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(small(x).float(), wanted, rtol=0.1, atol=0.1)
    small.train()
    with torch.autocast("cpu", torch.bfloat16):
        small(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def compiled(model: nn.Module, backend: str) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@each_method
def test_compiles_into_one_graph(name):
    layer, x = a_layer(name), torch.randn(1, 8, 6, 6)
    fast = compiled(layer, "eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x))
    layer.train()
    fast(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_with_the_default_backend(name):
    small, x = small_net(name), images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(small, "inductor")(x), small(x), rtol=1e-4, atol=1e-4)


def test_compiled_code_notices_what_has_changed():
    layer, x = a_layer(), torch.randn(1, 8, 6, 6)
    fast = compiled(layer, "eager")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with torch.no_grad():
        fast(x)
        layer.load_state_dict(doubled(layer))
        torch.testing.assert_close(fast(x), dense_answer(layer, x))
    for _ in range(2):  # training in eval mode, as with frozen batch norms
        fast(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), dense_answer(layer, x))


@each_method
def test_exports(name):
    small, x = small_net(name), images()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            program = torch.export.export(small, (x,), strict=False)
            torch.testing.assert_close(program.module()(x), small(x), rtol=1e-4, atol=1e-5)
