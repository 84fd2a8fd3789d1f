"""Rate → ranks: the ceiling, what stays dense and why, decay, scope, and the smallest feasible rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tspc
from tspc.compression.apply import apply_
from tspc.compression.compress import compress
from tspc.compression.plan import Plan
from tspc.compression.planning import plan
from tspc.compression.settings import Selection
from tspc.decompositions import METHODS
from tspc.errors import ConfigError, DecompositionError, InfeasibleRateError
from tspc.layers.forms import tensorized_layers
from tspc.models import NetworkSpec


def resnet(name: str = "resnet20") -> nn.Module:
    return NetworkSpec("builtin", name, 10).build()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("scope", ["layers", "network"])
def test_rate_is_a_ceiling(name, rate, scope):
    made = plan(resnet(), name, rate, rate_scope=scope, allocation="uniform")
    assert 0.85 * rate < made.rate_reached <= rate


@pytest.mark.parametrize("name", METHODS)
def test_the_network_has_the_parameters_that_its_plan_says(name):
    model = resnet("resnet8")
    made = plan(model, name, 0.2, allocation="uniform")
    apply_(model, made)
    # Bits that say which rows belong to a basis are no parameters of the module; in a plan 32 of them count as one.
    bases = [buffer for name, buffer in model.named_buffers() if name.endswith(".basis")]
    assert (name == "id") == bool(bases)
    assert count(model) + sum(-(-basis.numel() // 4) for basis in bases) == made.network_params


@pytest.mark.parametrize("decay", ["flat", "linear_inc", "linear_dec"])
def test_decay_moves_the_rate_but_not_the_total(decay):
    made = plan(resnet("resnet32"), "svd", 0.2, rate_decay=decay, allocation="uniform")
    assert 0.18 < made.rate_reached <= 0.2
    # The stages have kernels of different sizes, so the rates are compared within one of them.
    rates = [x.params / x.dense_params for x in made.tensorized if x.name.startswith("layer3") and "conv2" in x.name]
    if decay == "flat":
        assert max(rates) - min(rates) < 0.02
    else:
        assert rates == sorted(rates, reverse=decay == "linear_dec")
        assert max(rates) > 1.1 * min(rates)


def test_what_stays_dense_and_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3)
            self.grouped = nn.Conv2d(16, 16, 3, groups=16)
            self.middle = nn.Conv2d(16, 16, 3)
            self.skipped = nn.Conv2d(16, 16, 3)
            self.up = nn.ConvTranspose2d(16, 16, 3)
            self.tiny = nn.Conv2d(16, 1, 1)
            self.tied = nn.Linear(16, 16)
            self.twin = nn.Linear(16, 16)
            self.twin.weight = self.tied.weight
            self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
            self.last = nn.Linear(16, 10)

    made = plan(Net(), "tt", 0.5, exclude=["skip*"])
    reasons = {layer.name: layer.reason for layer in made.layers}
    assert reasons["middle"] is None
    assert reasons["first"] == "first convolution"
    assert reasons["last"] == "final layer"
    assert reasons["grouped"] == "depthwise convolution"
    assert reasons["skipped"] == "excluded"
    assert reasons["up"] is None
    assert "rank 1 needs" in reasons["tiny"]
    assert "shared" in reasons["tied"]
    assert "shared" in reasons["twin"]
    assert "NonDynamicallyQuantizableLinear" in reasons["special"]


def test_a_pattern_that_excludes_nothing_is_a_mistake():
    with pytest.raises(ConfigError, match=r"exclude=\['layre\*'\]: no convolution"):
        plan(resnet(), "svd", 0.3, exclude=["conv*", "layre*"])


def test_first_and_last_can_be_tensorized():
    made = plan(resnet(), "svd", 0.3, keep_first=False, keep_last=False)
    assert {"conv1", "linear"} <= {layer.name for layer in made.budgeted}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scope", ["layers", "network"])
def test_infeasible_rate_names_the_smallest_one(name, scope):
    with pytest.raises(InfeasibleRateError, match="smallest feasible rate") as caught:
        plan(resnet(), name, 1e-4, rate_scope=scope)
    smallest = caught.value.smallest
    made = plan(resnet(), name, smallest, rate_scope=scope, allocation="uniform")
    assert made.rate_reached <= smallest
    with pytest.raises(InfeasibleRateError):
        plan(resnet(), name, smallest - 2e-4, rate_scope=scope)


def test_a_layer_below_its_rank_one_form_takes_rank_one_and_others_pay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 256, 3), nn.Linear(8, 2))
    made = plan(model, "svd", 0.09, allocation="uniform")
    small, large = made.tensorized
    assert small.params > 0.09 * small.dense_params
    assert large.params < 0.09 * large.dense_params
    assert made.rate_reached <= 0.09


@pytest.mark.parametrize("rate", [0, -1, 1.5, math.nan, math.inf, "half", True])
def test_impossible_rates(rate):
    with pytest.raises(ConfigError, match="rate="):
        plan(resnet(), "svd", rate)


@pytest.mark.parametrize("method", ["svd", "rcp"])
def test_a_compressed_network_is_not_compressed_again(method):
    with pytest.raises(ConfigError, match="compressed already"):
        plan(compress(resnet("resnet8"), method, 0.3), "svd", 0.3)


@pytest.mark.parametrize(("method", "rate"), [("dense", None), ("svd", 1.0)])
def test_the_error_of_layers_that_are_only_rounded_is_expected(method, rate):
    model = resnet("resnet8")
    made = plan(model, method, rate, bits=4)
    whole = [layer for layer in made.budgeted if not layer.rank]
    found = {layer.name: layer.error for layer in apply_(model, made).layers}
    assert whole
    assert all(layer.bits == 4 for layer in whole)
    assert [layer.output_error for layer in whole] == pytest.approx([found[x.name] for x in whole], rel=1e-3)


def test_a_target_error_counts_rounding():
    with pytest.raises(ConfigError, match=r"at rate 1 the error is 0\.\d+; use more bits"):
        plan(resnet("resnet8"), "svd", target_error=0.01, bits=4)
    made = plan(resnet("resnet8"), "svd", target_error=0.01, bits=8)
    assert made.output_error is not None
    assert 0 < made.output_error <= 0.01


def test_other_wrong_arguments():
    with pytest.raises(ConfigError, match="rate_decay=up.*rate_scope=all"):
        plan(resnet(), "svd", 0.1, rate_decay="up", rate_scope="all")
    with pytest.raises(ConfigError, match=r"rate=0\.1 and target_error=0\.5 are two goals"):
        plan(resnet(), "svd", 0.1, target_error=0.5)
    with pytest.raises(ConfigError, match="no layer to tensorize"):
        plan(nn.Sequential(nn.ReLU()), "svd", 0.1)


def test_plan_round_trip_and_errors():
    model = resnet("resnet8")
    done = apply_(model, plan(model, "rtt", 0.3, rate_decay="linear_inc", allocation="uniform"))
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in done.tensorized)
    assert Plan.from_dict(done.to_dict()) == done


def test_a_bad_kernel_is_named_and_nothing_changes():
    model = resnet("resnet8")
    with torch.no_grad():
        model.layer3[0].conv2.weight[0] = math.nan
    with pytest.raises(DecompositionError, match=r"layer3.0.conv2.weight holds NaN"):
        apply_(model, plan(model, "svd", 0.3))
    assert type(model.layer1[0].conv1) is nn.Conv2d


def test_compress_copies():
    model = resnet("resnet8").eval()
    small = compress(model, "tk", 0.9)
    assert count(model) == 75290
    assert count(small) < 75290
    x = torch.randn(4, 3, 32, 32)
    assert small(x).shape == model(x).shape


def test_a_plan_leaves_a_network_in_training_as_it_is():
    """Spectral norm, for one, changes its buffers whenever a weight is read in training mode."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8))
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    plan(model, "svd", 0.5)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_settings_object_says_the_same_as_keywords():
    options = {"rate_scope": "network", "allocation": "uniform", "exclude": ["layer1*"], "rank_multiple": 2}
    asked = tspc.PlanSettings.of("cp", 0.3, **options)
    assert asked == tspc.PlanSettings(
        tspc.CP(),
        0.3,
        rate_scope="network",
        allocation="uniform",
        rank_multiple=2,
        selection=Selection(exclude=("layer1*",)),
    )
    model = resnet("resnet8")
    assert plan(model, asked) == plan(model, "cp", 0.3, **options)
    assert plan(model, asked, rate=0.4).rate == 0.4, "keywords replace"
    with pytest.raises(ConfigError, match=r"rate=0\.3 and target_error=0\.5 are two goals"):
        plan(model, asked, target_error=0.5)


def test_calibration_is_taken_in_the_same_forms():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)), torch.rand(12, 6)
    settings = tspc.Calibration(batch_size=4)
    expected = plan(model, "svd", 0.6, calibration=x, settings=settings)
    assert plan(model, "svd", 0.6, calibration=x.split(3), settings=settings) == expected
    small = compress(model, "svd", 0.6, calibration=x, settings=settings)
    with tspc.Samples(x, settings) as samples:
        assert plan(model, "svd", 0.6, calibration=samples) == expected
        assert torch.equal(compress(model, "svd", 0.6, calibration=samples)(x), small(x))
        with pytest.raises(ConfigError, match="settings of their own"):
            plan(model, "svd", 0.6, calibration=samples, settings=tspc.Calibration(batch_size=5))
    with pytest.raises(ConfigError, match=r"expected tspc\.Calibration"):
        plan(model, "svd", 0.6, calibration=x, settings=tspc.PlanSettings())  # type: ignore[arg-type]


def test_a_predicate_selects_layers():
    model = resnet("resnet8")
    chosen = model.get_submodule("layer2.0.conv2")
    options = {"allocation": "uniform", "filter_fn": lambda name, module: module is chosen}
    reasons = {row.name: row.reason for row in plan(model, "svd", 0.3, **options).layers}
    assert [name for name, reason in reasons.items() if reason is None] == ["layer2.0.conv2"]
    assert reasons["layer1.0.conv1"] == "left out by filter_fn"
    assert reasons["conv1"] == "first convolution"
    assert list(tensorized_layers(compress(model, "svd", 0.3, **options))) == ["layer2.0.conv2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filterfn": None}, "filterfn is not a setting; did you mean filter_fn?"),
        ({"exclud": ["a"]}, "exclud is not a setting; did you mean exclude?"),
        ({"exclude": "conv1"}, "exclude=conv1: expected a list of wildcards"),
        ({"rank_multiple": 1.5}, "rank_multiple=1.5: expected a whole number of at least 1"),
        ({"min_params": -1}, "min_params=-1: expected a whole number of at least 0"),
    ],
)
def test_wrong_keywords(options, message):
    for function in (plan, compress):
        with pytest.raises(ConfigError) as caught:
            function(nn.Linear(2, 2), "svd", 0.3, **options)
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(message)
