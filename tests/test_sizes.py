"""Budgets in bytes: `size`, `rate_unit=bytes`, widths that the plan chooses, and what is refused."""

from __future__ import annotations

import pytest
import torch

import tspc
from tests.test_calibration import images, resnet
from tspc.calibration.samples import Samples
from tspc.compression.goals import share_of
from tspc.compression.integers import on_grids, state_bytes
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.errors import ConfigError, InfeasibleRateError
from tspc.layers.forms import tensorized_layers

SLOW = pytest.param("auto", 0.15, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "size"),
    [("cp", 0.1), SLOW, ("dense", 0.15)],
)
def test_the_saved_network_has_at_most_the_size_that_was_asked_for(tmp_path, method, size):
    model = resnet()
    asked = PlanSettings.of(method, size=size)
    with Samples(images()) as samples:
        made, small = plan(model, asked, calibration=samples), resnet()
        tspc.apply_(small, made, samples)
    tspc.save(small, tmp_path / "small.safetensors")
    assert made.network_bytes == state_bytes(small)
    limit = share_of(str(size), state_bytes(model)) * state_bytes(model)
    assert 0.9 * limit < state_bytes(small) <= limit
    assert made.rate_reached == pytest.approx(state_bytes(small) / state_bytes(model))
    assert {layer.bits for layer in tensorized_layers(small).values()} <= {8, 6, 5, 4}
    loaded = tspc.load(tmp_path / "small.safetensors", resnet())
    assert torch.equal(loaded.eval()(images()[:4]), small.eval()(images()[:4]))


def test_a_smaller_size_takes_fewer_bits_before_it_takes_rank_one():
    expected = [plan(resnet(), "cp", size=size, calibration=images()) for size in (0.25, 0.1)]
    means = [sum(row.bits * row.params for row in made.budgeted) / made.params for made in expected]
    assert means[1] < means[0]
    assert expected[0].output_error < expected[1].output_error  # type: ignore[operator]


def test_the_rate_counts_bytes_of_the_layers_or_of_the_network():
    for scope in ("layers", "network"):
        made = plan(resnet(), "svd", 0.2, bits=8, rate_unit="bytes", rate_scope=scope, calibration=images())
        assert 0.18 < made.rate_reached <= 0.2
        assert made.rate_reached == made.bytes_reached
        assert {row.bits for row in made.budgeted} == {8}


def test_with_parameters_the_ranks_do_not_depend_on_the_bits():
    plain, narrow = (plan(resnet(), "svd", 0.3, bits=bits) for bits in (None, 8))
    assert [row.rank for row in plain.tensorized] == [row.rank for row in narrow.budgeted if row.rank]
    assert plain.params == narrow.params
    assert narrow.network_bytes < 0.3 * plain.network_bytes


def test_layers_that_the_user_left_out_keep_their_numbers():
    small = tspc.compress(resnet(), "svd", 0.3, bits=8, exclude=["layer1.*"], calibration=images())
    assert on_grids(small)
    assert not any(name.startswith("layer1.") for name in on_grids(small))


def test_plans_of_earlier_versions_are_read():
    made = plan(resnet(), "svd", 0.3)
    data = made.to_dict()
    for key in ("rate_unit", "network_dense_bytes"):
        del data[key]
    for layer in data["layers"]:
        del layer["bits"]
    earlier = Plan.from_dict(data)
    assert earlier.layers == made.layers
    assert earlier.rate_reached == made.rate_reached
    assert LayerPlan.from_dict(data["layers"][0]).bits == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3.5}, "bits=3.5: expected one of"),
        ({"bits": 7}, "bits=7: expected one of"),
        ({"bits": "auto"}, "give size="),
        ({"size": 500}, "size=500: expected a number with a unit"),
        ({"size": "10 parsecs"}, "size=10parsecs: expected"),
        ({"size": 0}, "size=0: expected"),
        ({"size": "nan"}, "size=nan: expected"),
        ({"size": "10kB", "rate": 0.1}, "rate=0.1 and size=10kB are two goals"),
        ({"size": 0.1, "target_error": 0.5}, "target_error=0.5 and size=0.1 are two goals"),
        ({"rate_unit": "kilos"}, "rate_unit=kilos: expected one of parameters, bytes"),
        ({"method": "dense"}, "method=dense is smaller only with fewer bits"),
    ],
)
def test_wrong_values_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigError) as error:
        plan(resnet(), **{"method": "svd"} | options)
    assert message in str(error.value)
    assert len(error.value.problems) == 1


def test_a_size_out_of_reach_names_the_least_one():
    with pytest.raises(InfeasibleRateError, match=r"size=10B cannot be met: .* is (\d+)B") as error:
        plan(resnet(), "cp", size="10B")
    least = str(error.value).rsplit(" ", 1)[1]
    assert plan(resnet(), "cp", size=least).network_bytes <= int(least.removesuffix("B"))
