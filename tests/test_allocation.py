"""Global allocation: the whole budget and no more, where it lowers the error most; `auto`; target errors; multiples."""

from __future__ import annotations

import pytest
from torch import nn

from tests.test_calibration import images, resnet
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import apply_, tensorized
from tspc.compression.curves import error_curves
from tspc.compression.error_curve import Curves, ErrorCurve
from tspc.compression.outline import outline
from tspc.compression.plan import Plan
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.decompositions import METHODS, SVD, Auto, TensorTrain, resolve
from tspc.errors import ConfigError, InfeasibleRateError

KEPT: dict[str, Curves] = {}


def curves_of(model: nn.Module, method: str) -> Curves:
    if method not in KEPT:
        KEPT[method] = error_curves(model, outline(model, PlanSettings.of(method)).chosen, resolve(method))
    return KEPT[method]


def smallest_step(made: Plan) -> int:
    """The fewest parameters that one more rank would take in any layer."""
    steps = []
    for layer in made.tensorized:
        assert layer.method is not None
        assert layer.rank is not None
        for rank in layer.method.raised(layer.shape, layer.rank):
            more = layer.method.num_params(layer.shape, rank) + layer.bias_params
            if more < layer.dense_params:
                steps.append(more - layer.params)
    return min(steps, default=10**9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("rate", [0.07, 0.2, 0.45, 0.9])
def test_the_budget_is_kept_and_used(method, allocation, rate):
    model = resnet()
    made = plan(model, method, rate, allocation=allocation, curves=curves_of(model, method))
    left = int(rate * made.dense_params) - made.params
    assert 0 <= left < smallest_step(made), "room for another rank was left"


@pytest.mark.parametrize("method", METHODS)
def test_global_is_expected_to_lose_less_than_uniform(method):
    model = resnet()
    errors = [
        plan(model, method, 0.2, allocation=a, curves=curves_of(model, method)).output_error
        for a in ("global", "uniform")
    ]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] <= errors[1]


def test_a_large_budget_keeps_layers_dense_and_counts_them():
    model = resnet()
    made = plan(model, "tk", 0.8, curves=curves_of(model, "tk"))
    kept = [layer for layer in made.budgeted if layer.method is None]
    assert kept
    assert all(layer.form == "dense: the budget allows it" and layer.params == layer.dense_params for layer in kept)
    assert made.params <= 0.8 * made.dense_params
    assert made.dense_params == plan(model, "tk", 0.1, curves=curves_of(model, "tk")).dense_params


def test_auto_takes_the_best_method_of_each_layer():
    model = resnet()
    names = ("svd", "cp", "tt")
    merged = {layer: [c for n in names for c in curves_of(model, n)[layer]] for layer in curves_of(model, "svd")}
    method = resolve("auto")
    assert isinstance(method, Auto)
    made = plan(model, Auto(tuple(METHODS[n]() for n in names)), 0.2, curves=merged)
    assert made.output_error is not None
    for name in names:
        single = plan(model, name, 0.2, curves=curves_of(model, name)).output_error
        assert single is not None
        assert made.output_error <= single * 1.005  # sizes are sampled
    done = apply_(model, made)
    assert Plan.from_dict(done.to_dict()) == done


def test_auto_is_measured_like_any_method():
    model, method = resnet(), Auto((SVD(), TensorTrain()))
    exclude = ["layer1*", "layer2*"]
    with Samples(images(16), Calibration(batch_size=8)) as samples:
        made = plan(model, method, 0.3, calibration=samples, exclude=exclude)
        small, done = tensorized(model, made, samples)
    assert {layer.method.name for layer in done.tensorized if layer.method} <= {"svd", "tt"}
    assert sum(p.numel() for p in small.parameters()) == done.network_params


@pytest.mark.parametrize("target", [0.1, 0.4, 0.7])
def test_the_smallest_rate_for_an_error(target):
    model = resnet()
    made = plan(model, "svd", target_error=target, curves=curves_of(model, "svd"))
    assert made.output_error is not None
    assert made.output_error <= target
    less = plan(model, "svd", made.rate * 0.95, curves=curves_of(model, "svd"))
    assert less.output_error is not None
    assert less.output_error > target


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_are_multiples(method):
    model = resnet()
    made = plan(model, method, 0.5, rank_multiple=4, curves=curves_of(model, method))
    for layer in made.tensorized:
        assert layer.method is not None
        assert layer.rank is not None
        top = layer.method.max_rank(layer.shape)
        assert all(r % 4 == 0 or r == limit for r, limit in zip(layer.rank, top, strict=True)), layer
    assert made.rate_reached <= 0.5


def test_a_multiple_raises_the_smallest_feasible_rate():
    with pytest.raises(InfeasibleRateError, match="smallest feasible rate"):
        plan(resnet(), "svd", 0.05, rank_multiple=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_decay": "linear_inc"}, "needs allocation=uniform"),
        ({"allocation": "fair"}, "allocation=fair: expected one of global, uniform"),
        ({"target_error": 2}, "target_error=2: expected"),
        ({"rank_multiple": 0}, "rank_multiple=0: expected"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(resnet(), "svd", 0.2, **options)


def test_a_curve_between_its_samples():
    curve = ErrorCurve(SVD(), (10, 100), (0.5, 0.1), 200)
    assert curve.at(1) == 0.5
    assert curve.at(100) == pytest.approx(0.1)
    assert 0.1 < curve.at(55) < 0.5
    assert curve.at(150) == pytest.approx(0.05)
    assert curve.at(200) == 0
    assert ErrorCurve.from_dict(curve.to_dict()) == curve
