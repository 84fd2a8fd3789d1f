"""Layers are fitted to what the reference's answer to the same images, or else to their own kernels."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import apply_
from tspc.compression.compress import compress
from tspc.compression.planning import plan
from tspc.errors import TspcWarning

WIDTH = 12


class Experts(nn.Module):
    """Sends each row to one of three layers, by what the layer before answered; to the last one none."""

    def __init__(self, skips: bool = False) -> None:
        super().__init__()
        self.first, self.skips = nn.Linear(WIDTH, WIDTH), skips
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        choice = (x[:, 0] > 0).long()
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = choice == number
            if rows.any() or not self.skips:
                y[rows] = expert(x[rows])
        return y


def rows(count: int = 64) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def at_full_rank(model: nn.Module) -> nn.Module:
    made = plan(model, "svd", 1.0, allocation="uniform", keep_last=False)
    layers = [replace(layer, rank=(WIDTH,), path=None) if layer.method else layer for layer in made.layers]
    with Samples(rows(), Calibration(batch_size=16)) as samples:
        apply_(model, replace(made, layers=tuple(layers)), samples)
    return model


@pytest.mark.parametrize("skips", [False, True])
def test_experts_keep_to_their_own_kernels(skips):
    torch.manual_seed(0)
    model = Experts(skips).eval()
    before = model(rows())
    with pytest.warns(TspcWarning, match=r"decide which images reach experts\.0.*mixture of experts") as found:
        small = compress(model, "svd", 0.4, calibration=rows(), settings=Calibration(batch_size=16), keep_last=False)
    assert len([w for w in found if "mixture" in str(w.message)]) == 1
    assert all(bool(value.isfinite().all()) for value in small.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TspcWarning)
        torch.testing.assert_close(at_full_rank(model)(rows()), before, rtol=1e-4, atol=1e-5)


def test_an_expert_to_which_no_image_comes_is_fitted_by_its_kernel():
    torch.manual_seed(0)
    model = Experts().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TspcWarning)
        small = compress(model, "svd", 0.4, calibration=rows(), keep_last=False, allocation="uniform")
    alone = compress(model, "svd", 0.4, keep_last=False, allocation="uniform")
    torch.testing.assert_close(small.experts[2].weight, alone.experts[2].weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(small.experts[2].bias, model.experts[2].bias)


def test_a_hook_that_changes_an_answer_is_no_part_of_the_kernel():
    """The layer is asked for its own answer; the hook then changes it as it did before."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)).eval()
    x, settings = rows(), Calibration(batch_size=16, sensitivity=False)
    expected = compress(plain, "svd", 0.4, calibration=x, settings=settings, allocation="uniform")
    plain[2].register_forward_hook(lambda module, args, output: output / 2)
    found = compress(plain, "svd", 0.4, calibration=x, settings=settings, allocation="uniform")
    torch.testing.assert_close(found[2].weight, expected[2].weight, rtol=1e-4, atol=1e-6)
