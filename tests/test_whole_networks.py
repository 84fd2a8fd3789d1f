"""What PyTorch does with networks works on compressed ones: compile, autocast, layouts, copies, DDP, quantisers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.methods import FAMILIES
from tests.small import network
from tests.test_processes import launch
from tspc.compression.compress import compress
from tspc.layers.forms import tensorized_layers
from tspc.models import NetworkSpec

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FORMS = pytest.mark.parametrize("method", ["tk", "rtt"])
"""A method that runs as a chain, and one that rebuilds kernels."""


def small(method: str) -> nn.Module:
    return compress(network(), method, 0.3, allocation="uniform").eval()


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    torch.compiler.reset()


@FORMS
def test_one_graph_forward_and_backward(method):
    model = small(method)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    expected, found = gradients(model, IMAGES), gradients(compiled._orig_mod, IMAGES)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", FAMILIES)
def test_autocast_and_channels_last(method):
    model = small(method)
    expected = model(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(IMAGES)
        answer.float().square().sum().backward()
    assert answer.dtype == torch.bfloat16
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(answer.float() / scale, expected / scale, rtol=0, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    images = IMAGES.to(memory_format=torch.channels_last)
    rearranged = model.to(memory_format=torch.channels_last)(images)  # type: ignore[call-overload]
    torch.testing.assert_close(rearranged, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", FAMILIES)
def test_copies_and_pickles_are_networks_of_their_own(method):
    model = small(method)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), model(IMAGES))
        assert tensorized_layers(twin).keys() == tensorized_layers(model).keys()
        before = model(IMAGES)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        assert torch.equal(model(IMAGES), before)
        assert not torch.equal(twin(IMAGES), before), "it reads its own weights"


WORKER = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from tests.methods import FAMILIES
from tests.small import network
from tspc.system import processes
from tspc.compression.compress import compress

torch.set_num_threads(1)
processes.join(cpu=True)
images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
gradients = {}
for method in ("tk", "rtt"):
    model = compress(network(), method, 0.3, allocation="uniform").eval()
    wrapped = DistributedDataParallel(model) if processes.count() > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), 1e-3)
    wrapped(images[processes.rank() :: processes.count()]).square().mean().backward()
    optimizer.step()
    gradients |= {f"{method}.{name}": p.grad for name, p in model.named_parameters()}
if processes.is_first():
    torch.save(gradients, sys.argv[1])
del wrapped, optimizer  # before the processes part
processes.wait()
"""


@pytest.mark.slow
def test_two_processes_of_ddp_have_the_gradients_of_one(tmp_path, forks):
    for count in (1, 2):
        launch(count, "-c", WORKER, str(tmp_path / f"{count}.pt"), folder=tmp_path, forks=forks)
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("path", ["chain", "rebuilt"])
def test_dense_chains_take_int8_weights(path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = compress(NetworkSpec("builtin", "lenet5", 10, 1, 28).build(), "svd", 0.5, allocation="uniform").eval()
    for layer in tensorized_layers(model).values():
        if layer.kind == "linear":
            layer.path = path
    images = torch.randn(16, 1, 28, 28)
    with torch.no_grad():
        expected = model(images)
    quantize_(model, Int8WeightOnlyConfig())
    linear = [m for m in model.modules() if type(m) is nn.Linear]
    assert len(linear) == 5, "two layers became chains of two"
    assert all(type(m.weight) is not nn.Parameter for m in linear), "quantised"
    found = model(images)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
