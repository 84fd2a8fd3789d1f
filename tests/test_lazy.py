"""Layers without sizes: a command gives them sizes, the library names them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tspc
from tspc.errors import ConfigError
from tspc.models import NetworkSpec


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(12), nn.Linear(12, 10)
    )


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 5), *list(lazy())[1:])


def test_a_network_without_sizes_is_refused_by_name(tmp_path):
    named = r"layers without sizes yet: 1 \(LazyBatchNorm2d\), 3 \(LazyLinear\); run the network once on an example"
    sized = lazy()
    sized(torch.zeros(2, 1, 8, 8))
    tspc.save(tspc.compress(sized, "svd", 0.5), tmp_path / "a.safetensors")
    for run in (
        lambda: tspc.compress(lazy(), "svd", 0.5),
        lambda: tspc.plan(lazy(), "svd", 0.5),
        lambda: tspc.fold_batch_norms(lazy(), torch.zeros(2, 1, 8, 8)),
        lambda: tspc.save(lazy(), tmp_path / "b.safetensors"),
        lambda: tspc.load(tmp_path / "a.safetensors", lazy()),
    ):
        with pytest.raises(ConfigError, match=named):
            run()


@pytest.mark.parametrize(("size", "message"), [(8, None), (None, "layers without sizes yet"), (2, "cannot get them")])
def test_a_factory_of_lazy_layers_gets_sizes_from_the_images(size, message):
    spec = NetworkSpec("custom", "custom", in_channels=1, image_size=size, factory=f"{__name__}:build")
    if message is None:
        network = spec.build()
        assert network[3].weight.shape == (12, 16 * 4 * 4)
        assert network.training
        assert network[1].num_batches_tracked == 0
    else:
        with pytest.raises(ConfigError, match=message):
            spec.build()
