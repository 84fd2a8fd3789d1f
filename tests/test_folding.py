"""Batch norms are folded where that changes nothing, and stay where it would."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import tspc
from tests.nets import Net, a_layer, images, small_net
from tspc.deploy import folding as inference
from tspc.deploy.folding import plain
from tspc.errors import DataError, TspcWarning
from tspc.layers.forms import tensorized_layers
from tspc.layers.norms import takes_shift
from tspc.traversal.tracing import trace


class Activated(nn.BatchNorm2d):
    """As those of timm are."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(input))


class Stubborn(nn.BatchNorm2d):
    """Goes by the batch in eval mode, too."""

    def train(self, mode: bool = True) -> nn.BatchNorm2d:
        return super().train(True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def known(model: nn.Module) -> nn.Module:
    """With statistics that are not those of a new batch norm."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.3, 3)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.3, 3)
                nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


def folded(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Folded, and found to answer the same."""
    with torch.no_grad():
        wanted = model(x)
        small = tspc.fold_batch_norms(model, x)
        torch.testing.assert_close(small(x), wanted, rtol=1e-4, atol=1e-4)
    return small


def hooked_layer(model: nn.Module) -> None:
    model[0].register_forward_hook(lambda module, args, output: 2 * output)


def hooked_norm(model: nn.Module) -> None:
    model[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def parametrized(model: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    parametrize.register_parametrization(model[1], "weight", Twice())


def another_forward(model: nn.Module) -> None:
    own = model[0].forward
    model[0].forward = lambda x: F.relu(own(x))


def without_statistics(model: nn.Module) -> None:
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)


def a_second_name(model: nn.Module) -> None:
    model.other = nn.Identity()
    model.other.norm = model[1]


KEPT = {
    "an activation in the norm": lambda model: model.__setitem__(1, known(Activated(6))),
    "a hook on the layer": hooked_layer,
    "a hook on the norm": hooked_norm,
    "a parametrized norm": parametrized,
    "another forward": another_forward,
    "no statistics": without_statistics,
    "statistics of the batch": lambda model: model.__setitem__(1, known(Stubborn(6))),
    "a shared norm": lambda model: model.insert(2, model[1]),
    "a norm with two names": a_second_name,
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_a_batch_norm_that_a_layer_cannot_take_over_stays(change):
    torch.manual_seed(0)
    model = known(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    change(model)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    small = folded(model, torch.randn(2, 3, 9, 9))
    left = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == norms - 1, "the other one is folded"


@pytest.mark.parametrize("length", [8, 5])
def test_a_batch_norm_over_another_axis_stays(length):
    model = known(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(length), nn.Flatten(), nn.Linear(8 * length, 3)))
    x = torch.randn(2, length, 4)
    assert isinstance(folded(model, x)[1], nn.BatchNorm1d)
    assert trace(model, ["0"], x).batch_norms == {}


def test_a_batch_norm_after_a_convolution_without_a_batch_stays():
    model = known(nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)))
    assert isinstance(folded(model, torch.randn(3, 8))[1], nn.BatchNorm1d)
    assert isinstance(folded(model, torch.randn(2, 3, 8))[1], nn.Identity)
    dense = known(nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8)))
    assert isinstance(folded(dense, torch.randn(2, 3))[1], nn.Identity)


def test_what_only_the_answer_shows_is_undone_and_said(monkeypatch):
    class Peeks(Net):
        """Reads a number of its batch norm, as no hook can see."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.norm1.running_var.sum()

    model = known(Peeks())
    with pytest.warns(TspcWarning, match=r"so they stay: wide, norm1$"):
        small = folded(model, images())
    kinds = [type(m).__name__ for m in (small.norm0, small.norm1, small.norm2)]
    assert kinds == ["Identity", "BatchNorm2d", "Identity"]
    monkeypatch.setattr(inference, "_absorbed", lambda layer, norm: layer)
    with pytest.warns(TspcWarning, match="stem, norm0, wide, norm1, point, norm2"):
        folded(known(Net()), images())


def test_16_bits_fold_within_their_own_rounding():
    model = known(Net()).bfloat16()
    x = images().bfloat16()
    small = tspc.fold_batch_norms(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    with torch.no_grad():
        exact = model.double()(x.double())
        assert (small(x).double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_network_that_makes_rounding_large_is_folded_with_a_word():
    class Chaotic(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(20_000 * super().forward(x))

    with pytest.warns(TspcWarning, match="this network amplifies rounding"):
        small = tspc.fold_batch_norms(known(Chaotic()), images())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())


def test_an_answer_that_cannot_be_compared_is_refused():
    model = Net().eval()
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(DataError, match="no finite number"):
        tspc.fold_batch_norms(model, images())
    with pytest.raises(DataError, match=r"cannot take images of shape \(2, 4, 9, 9\)"):
        tspc.fold_batch_norms(Net(), torch.zeros(2, 4, 9, 9))


def test_frozen_parameters_stay_frozen_when_they_are_folded():
    model = known(Net())
    model.stem.weight.requires_grad_(False)
    small = folded(model, images())
    assert [small.stem.weight.requires_grad, small.stem.bias.requires_grad] == [False, True]


def test_a_network_that_reads_a_weight_gets_a_layer_that_has_one():
    class Reads(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.wide.weight.dtype))

    torch.manual_seed(0)
    small = tspc.compress(Reads(), "tt", 0.5, allocation="uniform").eval()
    small.wide.path = small.hidden.path = "chain"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = folded(small, images())
    assert not tensorized_layers(fast)
    assert [type(fast.wide), type(fast.hidden)] == [nn.Conv2d, nn.Sequential]
    assert (fast.hidden.in_features, fast.hidden.out_features) == (64, 48)


@pytest.mark.parametrize(("name", "path"), [("tt", "chain"), ("tk", "1|23"), ("rcp", "rebuilt")])
def test_plain_layers_show_the_sizes_of_the_dense_layer_and_keep_its_hooks(name, path):
    layer = plain(a_layer(name, path))
    assert isinstance(layer, nn.Conv2d) == (path == "rebuilt")
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.padding) == (8, 8, (3, 3), (1, 1))
    small, seen = small_net(name), []
    small.wide.register_forward_hook(lambda *call: seen.append("wide"))
    small.wide(torch.zeros(1, 16, 4, 4))
    seen.clear()
    fast = folded(small, images())
    seen.clear()
    fast(images())
    assert seen == ["wide"]


def test_the_mean_is_shifted_in_batch_norms_that_undo_it():
    output = torch.randn(2, 6, 5, 5)
    assert takes_shift(known(nn.BatchNorm2d(6)), output)
    norm = known(Activated(6))
    before = norm.running_mean.clone()
    assert takes_shift(norm, output)
    assert torch.equal(norm.running_mean, before)

    class Gated(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * input.sigmoid()

    assert not takes_shift(known(Gated(6)), output)
