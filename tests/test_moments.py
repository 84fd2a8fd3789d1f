"""Moments of what varies little about a large mean, of many outputs, and of several processes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from tspc.calibration import products
from tspc.calibration.moments import Moments, Statistics
from tspc.phases.batch_norm import rebase_, refit_norms_
from tspc.system import processes

CPU = torch.device("cpu")


def rows(deviation: float, count: int = 600, n: int = 8) -> Tensor:
    return (100 + deviation * torch.randn(count, n, generator=torch.Generator().manual_seed(0))).float()


@pytest.mark.parametrize("deviation", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("centred", [True, False])
def test_a_large_mean_leaves_the_covariance_its_digits(deviation, centred):
    x, w = rows(deviation), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    y = (x.double() @ w.double().T).float()
    found = Moments(8, 5, CPU)
    for part in torch.arange(600).split(150):
        found.add(x[None, part], y[part])
    result = found.statistics(w, centred, 1e-9)
    wide, out = x.double(), y.double()
    mean = wide.mean(0) if centred else 0.0
    away = out.mean(0) if centred else 0.0
    torch.testing.assert_close(result.inputs[0], (wide - mean).T @ (wide - mean) / 600, rtol=2e-4, atol=1e-8)
    torch.testing.assert_close(result.cross[0], (out - away).T @ (wide - mean) / 600, rtol=1e-3, atol=3e-7)
    torch.testing.assert_close(result.outputs[0], (out - away).T @ (out - away) / 600, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result.mean_x[0], wide.mean(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("deviation", [0.1, 0.01])
def test_batch_norms_too(deviation):
    x = rows(deviation).reshape(4, 150, 8).transpose(1, 2)

    def run(*networks: nn.Module) -> None:
        for batch in x.split(2):
            for network in networks:
                network(batch)

    wide = x.double()
    variance, mean = torch.var_mean(wide, (0, 2), correction=0)
    network, reference = nn.Sequential(nn.BatchNorm1d(8)), nn.Sequential(nn.BatchNorm1d(8))
    with torch.no_grad():
        reference[0].running_mean.fill_(99.5)
    rebase_(network, lambda: run(network))
    torch.testing.assert_close(network[0].running_var.double(), variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(network[0].running_mean.double(), mean, rtol=1e-6, atol=0)
    refit_norms_(network, reference, lambda: run(network, reference.eval()))
    expected = reference(x)
    together = ((wide - mean[:, None]) * (expected - expected.mean((0, 2), keepdim=True))).mean((0, 2))
    weight = together / (variance + network[0].eps).sqrt()
    torch.testing.assert_close(network[0].weight.double(), weight, rtol=2e-3, atol=0)
    torch.testing.assert_close(network.eval()(x).mean((0, 2)), expected.mean((0, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_outputs_need_their_own_moments_alone(monkeypatch, weighted):
    x, y = torch.randn(200, 8), torch.randn(200, 6)
    kernel, weights = torch.randn(6, 8), torch.rand(6) + 0.1

    def statistics(targets: int | None, sensitivity: Tensor) -> Statistics:
        found = Moments(8, targets, CPU, groups=2)
        found.add(torch.stack((x, x.flip(0))), None if targets is None else y)
        return found.statistics(kernel, True, 1e-3, sensitivity if weighted else None)

    for targets in (6, None):
        monkeypatch.setattr(products, "WIDEST_OUTPUT", 6)
        full = statistics(targets, weights.diag())
        monkeypatch.setattr(products, "WIDEST_OUTPUT", 5)
        found = statistics(targets, weights)
        assert found.outputs.shape == (2, 3)
        torch.testing.assert_close(found.outputs, full.outputs.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.target, full.target, rtol=1e-5, atol=1e-6)
        other = torch.randn(6, 8)
        assert found.error(other) == pytest.approx(full.error(other))
        if weighted:
            assert found.metric.outputs is not None
            torch.testing.assert_close(found.metric.outputs, weights.double())
            assert found.metric.squared(other.double()) == pytest.approx(full.metric.squared(other.double()))


@pytest.mark.parametrize("widest", [4, 1])
def test_processes_see_together_what_one_sees(monkeypatch, widest):
    monkeypatch.setattr(products, "WIDEST_OUTPUT", widest)
    x, y = rows(0.01), rows(0.1, n=4)
    parts = [torch.arange(250), torch.arange(250, 600)]
    alone, both = Moments(8, 4, CPU), [Moments(8, 4, CPU) for _ in parts]
    alone.add(x[None], y)
    barrier, given = threading.Barrier(2), [torch.zeros(()), torch.zeros(())]

    def summed(tensor: Tensor) -> Tensor:
        """As all processes do at once; here the processes are threads."""
        own = int(threading.current_thread().name)
        given[own] = tensor.clone()
        barrier.wait(10)
        tensor.copy_(given[0] + given[1])
        barrier.wait(10)
        return tensor

    monkeypatch.setattr(processes, "summed", summed)
    monkeypatch.setattr(processes, "count", lambda: 2)
    for found, part in zip(both, parts, strict=True):
        found.add(x[None, part], y[part])
    threads = [threading.Thread(target=found.join, name=str(i)) for i, found in enumerate(both)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = torch.zeros(4, 8)
    expected = alone.statistics(own, True, 1e-6)
    for found in both:
        assert found.count == 600
        result = found.statistics(own, True, 1e-6)
        for name in ("mean_x", "mean_y", "inputs", "cross", "outputs"):
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-4, atol=1e-8)
