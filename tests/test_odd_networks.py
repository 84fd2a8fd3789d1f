"""Networks that do what few networks do: they draw random numbers, or put things on their layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tspc
from tspc.errors import ConfigError, DataError, DecompositionError, TspcWarning


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


class Noisy(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.head(self.c(x + 2 * torch.randn_like(x)))


def images() -> Tensor:
    return torch.randn(512, 8, generator=torch.Generator().manual_seed(1))


def test_noise_in_eval_mode_does_not_shrink_the_layers_behind_it():
    network = Noisy().eval()
    state = torch.get_rng_state()
    small = tspc.compress(network, "svd", 0.9, calibration=images())
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on as before"
    share = (small.get_submodule("c").weight * network.c.weight).sum() / network.c.weight.square().sum()
    assert float(share.detach()) == pytest.approx(1, abs=0.05)


def test_hooks_on_a_weight_are_named():
    network = Chain()
    network.b.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.warns(TspcWarning, match="hooks on the parameters of b do not act"):
        tspc.compress(network, "svd", 0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(1))), "parameters, buffers or modules"),
        (lambda layer: layer.register_buffer("gain", torch.ones(1)), "parameters, buffers or modules"),
        (lambda layer: layer.add_module("gain", nn.Identity()), "parameters, buffers or modules"),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(1j * torch.ones(64, 64))),
            "numbers of the type complex64",
        ),
    ],
)
def test_a_layer_with_things_of_its_own_stays_dense(change, reason):
    network = Chain()
    change(network.b)
    rows = {row.name: row.reason for row in tspc.plan(network, "svd", 0.9).layers}
    assert reason in str(rows["b"])
    assert rows["a"] is None


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ((torch.randint(2, 9, (6, 7)), torch.ones(6, 7, dtype=torch.long)), 6),
        ((torch.zeros(6, 7), torch.zeros(6, dtype=torch.long)), 6),
        (torch.zeros(6, 7).split(2), 6),
        ((torch.zeros(6, 7), torch.zeros(6, 7)), 12),
    ],
)
def test_a_tuple_of_tensors_is_a_batch_with_a_mask_or_labels_or_several_batches(given, count):
    with tspc.Samples(given) as samples:
        assert len(samples) == count


def test_wrong_values_are_named():
    with pytest.raises(DataError, match=r"torch\.float32 and torch\.float64; give one type"):
        tspc.compress(Chain(), "svd", 0.5, calibration=[images()[:99], images().double()])
    with pytest.raises(ConfigError, match="keep_first=no: expected true or false"):
        tspc.plan(Chain(), "svd", 0.5, keep_first="no")
    with pytest.raises(ConfigError, match=r"calibration\.compensate=5: expected true or false"):
        tspc.compress(Chain(), "svd", 0.5, calibration=images(), settings=tspc.Calibration(compensate=5))  # type: ignore
    with pytest.raises(DecompositionError, match="no tensor format"):
        tspc.Reshaped(tspc.SVD(), 2)  # type: ignore[arg-type]


def test_samples_whose_block_has_ended_are_refused():
    with tspc.Samples(images()) as samples:
        pass
    with pytest.raises(DataError, match="their `with` block has ended"):
        tspc.compress(Chain(), "svd", 0.5, calibration=samples)
