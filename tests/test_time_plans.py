"""Plans under a limit on the time: the closed loop, refusals, and never slower; no test looks at a real clock."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.nets import Net, images
from tests.test_times import ALL, fake_clock
from tspc.compression import network_times, time_plans
from tspc.compression.layer_times import LayerTimes, Place
from tspc.compression.network_times import AIM, Measured, Stopwatch, chosen, search, verify
from tspc.compression.outline import outline
from tspc.compression.plan import Plan
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.errors import ConfigError, InfeasibleTimeError, UntimedError
from tspc.layers.chains import CHAIN, REBUILT
from tspc.run import contract

REST, FACTOR = 0.5, 1.4
"""The fake network: seconds beside its layers, as a share of theirs, and how much longer layers take inside it."""


class FakeWatch:
    """A stopwatch for networks whose time is that of their layers by other constants."""

    factor, calls = FACTOR, 0

    def __init__(self, model, inputs, place, seconds):
        self.model, self.table, self.inputs = model, LayerTimes(place, fake_clock), inputs

    def total(self, rows):
        keeper = time_plans.Timekeeper(self.model, PlanSettings(), {}, self.table, self)
        keeper.called = time_plans.calls(self.model, [row.name for row in rows], self.inputs)
        return sum(keeper.seconds(row) for row in rows)

    @property
    def dense(self):
        rows = outline(self.model, PlanSettings.of("svd", **ALL)).layers
        return self.total(rows)

    @property
    def dense_seconds(self):
        return self.dense * (REST + FACTOR)

    def rows(self, rows):
        type(self).calls += 1
        return (REST * self.dense + self.factor * self.total(rows)) / self.dense_seconds


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(time_plans, "Stopwatch", FakeWatch)
    monkeypatch.setattr(time_plans, "LayerTimes", lambda place: LayerTimes(place, fake_clock))
    monkeypatch.setattr(FakeWatch, "calls", 0)
    return FakeWatch


def planned(method="svd", **options):
    torch.manual_seed(0)
    return plan(Net(), method, **{"example": images(1), "threads": 1} | ALL | options)


@pytest.mark.parametrize(("rest", "factor"), [(0.0, 1.0), (0.2, 0.3), (0.1, 2.5)])
@pytest.mark.parametrize("limit", [0.9, 0.7, 0.5])
def test_the_closed_loop_finds_the_limit(rest, factor, limit):
    dense = rest + factor
    tried = search(lambda x: round(x, 4), lambda x: x, lambda x: (rest + factor * x) / dense, limit, (0.05, 1.0), dense)
    found = chosen(tried, limit)
    assert found is not None
    assert 0.9 * limit <= found.share <= limit
    assert len(tried) <= 5


def test_the_closed_loop_tells_the_fastest_if_the_limit_is_out_of_reach():
    tried = search(lambda x: x, lambda x: x, lambda x: 0.5 + 0.5 * x, 0.3, (0.2, 1.0), 1.0)
    assert chosen(tried, 0.3) is None
    assert min(each.share for each in tried) == pytest.approx(0.6)


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.0])
@pytest.mark.parametrize("method", ["svd", "tk"])
def test_a_speedup_is_kept_by_the_whole_network(fake, speedup, method):
    made = planned(method, speedup=speedup)
    assert fake.calls <= 6
    assert made.promise is not None
    ratio = made.promise["seconds"] / made.promise["dense_seconds"]
    assert 0.8 / speedup <= ratio <= 1 / speedup
    assert made.promise["limit"] == f"speedup={speedup:g}"
    assert Plan.from_dict(made.to_dict()) == made


def test_a_faster_network_loses_more_and_a_size_is_kept_too(fake):
    errors = [planned(speedup=speedup).output_error for speedup in (1.2, 1.6, 2.0)]
    assert errors == sorted(errors)
    both = planned(speedup=1.2, rate=0.15)
    assert both.rate_reached <= 0.15
    assert both.promise is not None
    assert both.promise["seconds"] <= both.promise["dense_seconds"] / 1.2
    assert both.output_error >= errors[0]
    assert planned(speedup=1, rate=0.5).rate_reached <= 0.5


def test_what_is_out_of_reach_is_refused_with_the_nearest(fake):
    with pytest.raises(
        InfeasibleTimeError, match=r"^speedup=100 cannot be met: the fastest network .* in eager"
    ) as found:
        planned(speedup=100)
    near = found.value.fastest
    again = planned(latency=f"{1.02e6 * near}us")
    assert again.promise is not None
    assert again.promise["seconds"] <= 1.02 * near
    with pytest.raises(InfeasibleTimeError, match=r"latency=\d.* cannot be met"):
        planned(latency=f"{0.9e6 * near:g}us")
    with pytest.raises(ConfigError, match="latency=1s is kept already: the dense network takes"):
        planned(latency="1s")
    with pytest.raises(ConfigError, match="speedup=2 needs an example input, and there is none"):
        planned(speedup=2, example=None)
    with pytest.raises(ConfigError, match="the network fails on the one given"):
        planned(speedup=2, example=torch.zeros(1, 7))


def test_few_bits_and_a_batch(fake):
    made = planned(speedup=1.5, bits=8, batch=3)
    assert made.promise is not None
    assert made.promise["batch"] == 3
    assert all(row.bits == 8 for row in made.layers)


def test_latency_without_a_number_is_never_slower(fake, monkeypatch):
    quick = planned("tk", rate=0.4, objective="latency")
    assert quick.promise is not None
    assert quick.promise["seconds"] < quick.promise["dense_seconds"]
    assert quick.promise["limit"] == "objective=latency"
    assert any(row.path == CHAIN for row in quick.tensorized)
    # Inside this network every chain is slower than the dense layer: no layer runs as one.
    monkeypatch.setattr(
        FakeWatch, "rows", lambda self, rows: 1.0 + 0.1 * sum(x.path not in (None, REBUILT) for x in rows)
    )
    for allocation in ("global", "uniform"):
        slow = planned("tk", rate=0.4, objective="latency", allocation=allocation)
        assert {row.path for row in slow.tensorized} == {REBUILT}
        assert slow.rate_reached <= 0.4
        assert slow.promise is not None
        assert slow.promise["seconds"] == slow.promise["dense_seconds"]


class Borrowing(Net):
    """A network that uses the weight of a layer, which it never calls."""

    def forward(self, x):
        x = F.relu(self.norm1(self.wide(F.relu(self.norm0(self.stem(x))))))
        x = F.relu(self.norm2(self.point(x)))
        return self.head(F.relu(F.linear(x.mean((2, 3)), self.hidden.weight, self.hidden.bias)))


def test_a_layer_that_is_never_called_saves_no_time(fake, monkeypatch):
    seen = []
    monkeypatch.setattr(FakeWatch, "rows", lambda self, rows: seen.append({row.name for row in rows}) or 0.5)
    made = plan(Borrowing(), "svd", 0.3, objective="latency", example=images(1), threads=1, **ALL)
    assert any(row.name == "hidden" and row.method for row in made.layers)
    assert seen == [{"stem", "wide", "point", "head"}]


def test_what_cannot_be_timed_goes_by_the_cost_model(fake, monkeypatch):
    assert planned(rate=0.4, objective="latency", example=None).promise is None

    def refuse(self, rows):
        raise UntimedError(["runtime=eager: it does not take the network"])

    monkeypatch.setattr(FakeWatch, "rows", refuse)
    with pytest.warns(Warning, match="objective=latency goes by the cost model: runtime=eager"):
        assert planned(rate=0.4, objective="latency").promise is None
    with pytest.raises(UntimedError, match="does not take the network"):
        planned(speedup=2)


def test_verify_says_kept_or_broken(monkeypatch):
    model = Net().eval()
    turns = {"dense": [2.0, 2.0, 2.2], "compressed": [1.0, 1.02, 1.1]}
    monkeypatch.setattr(Stopwatch, "of", lambda self, small: Measured(**turns))
    for options, limit, kept in (
        ({"latency": "1s"}, 1.0, True),
        ({"latency": "0.9s"}, 0.9, False),
        ({"speedup": 2}, 1.0, True),
        ({"speedup": 2.2}, 2 / 2.2, False),
        ({}, 2.0, True),
    ):
        found = verify(model, model, images(1), PlanSettings.of("svd", **options))
        assert found["limit"] == pytest.approx(limit)
        assert found["kept"] is kept
        assert found["dense"] == {"median": 2.0, "p95": 2.2}
        assert found["compressed"]["p95"] == 1.1


def test_networks_are_timed_in_turns_in_the_runtimes():
    model = Net().eval()
    made = plan(model, "svd", rate=0.3, allocation="uniform")
    for runtime in ("eager", "onnx"):
        watch = Stopwatch(model, images(1), Place(runtime, 2), 0.01)
        assert watch.inputs[0].shape[0] == 2
        assert watch.rows(made.layers) > 0
        assert watch.dense_seconds > 0
    assert network_times.ENOUGH[0] < AIM < network_times.ENOUGH[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": "8"}, "latency=8: expected a time with a unit"),
        ({"speedup": 0.5}, "speedup=0.5: expected"),
        ({"latency": "8ms", "speedup": 2}, "are two goals"),
        ({"speedup": 2, "allocation": "uniform"}, "needs allocation=global"),
        ({"speedup": 2, "batch": 0}, "batch=0"),
        ({"speedup": 2, "runtime": "onxx"}, "runtime=onxx: expected one of"),
    ],
)
def test_wrong_limits_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        planned(**options)


@pytest.mark.parametrize(
    ("limit", "dense_now", "now", "blames_the_machine"),
    [
        ("latency=8ms", 0.012, 0.0095, True),
        ("latency=8ms", 0.0104, 0.0095, False),
        ("latency=8ms", 0.012, 0.0079, False),
        ("speedup=1.25", 0.012, 0.0119, False),
    ],
)
def test_a_machine_that_became_slower_is_named(limit, dense_now, now, blames_the_machine):
    promise = {"limit": limit, "runtime": "eager", "batch": 1, "threads": 1, "dense_seconds": 0.01, "seconds": 0.0078}
    dense, small = ({"median": seconds, "p95": seconds} for seconds in (dense_now, now))
    goal = contract._of_time(promise, {"dense": dense, "compressed": small, "kept": now <= 0.0084})
    said = "the dense network takes 20 % more than at the promise, so the machine is slower now"
    assert (said in goal.measured) == blames_the_machine
