"""Large networks run in bfloat16 while their layers are looked at, where that is faster and changes little."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.test_calibration import resnet
from tests.test_compensation import output_distance
from tspc.calibration.gathering import moments_of
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.compress import compress
from tspc.traversal import shortness


@pytest.fixture
def fast(monkeypatch):
    """As if the CPU knew bfloat16, and every network were large."""
    monkeypatch.setattr(shortness, "WORK", 0.0)
    if not torch.cpu._is_avx512_supported():  # such a CPU rounds every sum to bfloat16, so it rounds more
        monkeypatch.setattr(shortness, "NOISE", 1e-2)
    monkeypatch.setattr(shortness, "rough", lambda device: torch.bfloat16)


def images(count: int = 12) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Shifted(nn.Module):
    """The second layer sees a small signal on a large mean, of which bfloat16 keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * 0.01 + 100).mean((2, 3))


def is_short(model: nn.Module, **settings: str) -> bool:
    torch.manual_seed(0)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with Samples(images(), Calibration(batch_size=6, sensitivity=False, **settings)) as samples:
        samples.survey(model.eval(), names)
        return samples.short


def test_it_is_chosen_where_the_outputs_stay_nearly_the_same(fast):
    assert is_short(resnet())
    assert not is_short(resnet(), precision="float32"), "the user said so"
    assert not is_short(Shifted())


def test_it_is_not_chosen_for_little_work(monkeypatch):
    monkeypatch.setattr(shortness, "rough", lambda device: torch.bfloat16)
    assert not is_short(resnet())


def test_the_moments_are_nearly_those_of_float32(fast):
    model, found = resnet(), {}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for precision in ("auto", "float32"):
        settings = Calibration(batch_size=6, patches=10**9, sensitivity=False, precision=precision)
        with Samples(images(), settings) as samples:
            moments = dict(moments_of(model, names, samples, samples.survey(model, names).trace))
            found[precision] = {name: of.metric(True, 1e-3).inputs for name, of in moments.items()}
    for name in names[1:]:  # the first one sees the images themselves
        short, exact = found["auto"][name], found["float32"][name]
        assert 0 < float((short - exact).norm() / exact.norm()) < 0.01, name


def test_compression_comes_out_the_same_within_the_rounding(fast):
    x = images(48)
    small = {
        precision: compress(resnet(), "tk", 0.5, calibration=x, settings=Calibration(precision=precision))
        for precision in ("auto", "float32")
    }
    errors = [output_distance(resnet(), network, x) for network in small.values()]
    assert errors[0] < 1.1 * errors[1]


class Centred(nn.Module):
    """A layer norm takes a large mean away, so that bfloat16 would leave a wrong variance and a wrong gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x) * 0.1 + 100).relu())


def gradients(precision: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    with Samples(x, Calibration(precision=precision)) as samples:
        return samples.survey(Centred().eval(), ["first", "second"]).sensitivity["first"][0]


def test_gradients_are_taken_in_bfloat16_only_where_the_network_runs_in_it(fast):
    torch.testing.assert_close(gradients("auto"), gradients("float32"))


class Constant(nn.Module):
    """All answers are the same; their rounding is a shift that nothing would hide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x * 0).relu()).mean((2, 3))


def test_a_shift_by_rounding_counts(fast):
    assert not is_short(Constant())
