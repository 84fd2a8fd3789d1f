"""What judges a network: the built-in metrics by hand, a user's function, and whole runs with them."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from tests.small import CPU, context_of
from tspc.errors import ConfigError, DataError, TspcError
from tspc.phases.agreement import keep_better_
from tspc.phases.finetune import Finetuning, finetune
from tspc.run.config import read_config
from tspc.store.schemas import ACCURACY, problem
from tspc.store.scores import described, scale_of, shown, value_in
from tspc.training import METRICS, Progress, drop, evaluate, judged, losses, measure, metric_of


class Table(nn.Module):
    """Answers with rows of a table, which the inputs number."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.float32))

    def forward(self, inputs):
        return self.rows[inputs]


REFERENCE = Table([[9, 1, 0, 0, 0, 0], [0, 4, 3, 2, 1, -1], [0, 5, 3, 2, 1, -1], [0, 0, 0, 0, 0, 2]])
SMALL = Table([[8, 1, 0, 0, 0, 0], [0, 3, 4, 2, 1, -1], [0, 5, 3, 2, 1, -1], [2, 0, 0, 0, 0, 1]])
LABELS = torch.tensor([0, 1, 5, 5])


def batches(labels=LABELS):
    return list(zip(torch.arange(4).split(3), labels.split(3), strict=True))


def score(name, model=SMALL, labels=LABELS):
    return measure(metric_of(name), model, batches(labels), CPU, REFERENCE)


def by_hand(name):
    """The number for each input, without tspc."""
    small, reference = SMALL.rows, REFERENCE.rows
    return {
        "top1": torch.tensor([1.0, 0, 0, 0]),
        "top5": torch.tensor([1.0, 1, 0, 1]),
        "agreement": torch.tensor([1.0, 0, 1, 0]),
        "cosine": (small * reference).sum(1) / (small.norm(dim=1) * reference.norm(dim=1)),
        "perplexity": small.exp().sum(1).log() - small[range(4), LABELS],
        "mse": (small - reference).square().mean(1),
    }[name]


@pytest.mark.parametrize("name", METRICS)
def test_built_in_metrics_are_what_they_say(name):
    found, each = score(name), by_hand(name)
    torch.testing.assert_close(found.each, each)
    mean = float(each.double().mean())
    assert found.value == pytest.approx(math.exp(mean) if name == "perplexity" else mean, rel=1e-6)
    assert found.count == 4
    assert found.points == pytest.approx((100 if found.metric.is_share else 1) * found.value)
    assert problem(found.to_dict(), ACCURACY) is None
    assert value_in(found.to_dict()) == found.value


@pytest.mark.parametrize("name", METRICS)
def test_a_drop_is_positive_where_the_network_is_worse(name):
    before, after = score(name, REFERENCE), score(name)
    assert drop(before, before) == 0
    assert drop(before, after) == pytest.approx(-drop(after, before))
    assert drop(before, after) > 0 or name == "top5"
    lost = losses(after.metric, before, after)
    if name == "perplexity":
        assert lost is None
    else:
        assert float(lost.mean()) == pytest.approx(drop(before, after), rel=1e-5)
    if name == "top1":
        assert lost.tolist() == [0, 100, 0, 100]


def test_positions_and_float_targets():
    torch.manual_seed(0)
    own, other = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    small, reference = Table(own.tolist()), Table(other.tolist())
    targets = torch.tensor([[0, 1, 2, -100], [3, 4, 0, 1], [2, 2, -100, -100]])
    found = measure(metric_of("perplexity"), small, [(torch.arange(3), targets)], CPU)
    logs = own.log_softmax(1)
    first = -(logs[0, 0, 0] + logs[0, 1, 1] + logs[0, 2, 2]) / 3
    assert float(found.each[0]) == pytest.approx(float(first), rel=1e-5)
    found = measure(metric_of("agreement"), small, [(torch.arange(3), targets)], CPU, reference)
    assert found.each.tolist() == (own.argmax(1) == other.argmax(1)).float().mean(1).tolist()
    found = measure(metric_of("mse"), small, [(torch.arange(3), other)], CPU)
    torch.testing.assert_close(found.each, (own - other).square().mean((1, 2)))


def test_what_a_metric_cannot_judge_is_told():
    with pytest.raises(ConfigError, match="metric=cosine compares answers with the reference's"):
        measure(metric_of("cosine"), SMALL, batches(), CPU)
    with pytest.raises(ConfigError, match=r"answers with shape \(3, 6\), but the data has 10 classes"):
        measure(metric_of("top5"), SMALL, batches(), CPU, num_classes=10)
    with pytest.raises(ConfigError, match="there are no inputs"):
        measure(metric_of("top1"), SMALL, [], CPU)
    with pytest.raises(TspcError, match="metric=mse is nan: the network's answers are not finite"):
        score("mse", Table([[math.nan] * 6] * 4))
    huge = score("perplexity", Table([[1e6, 0, 0, 0, 0, 0]] * 4))
    assert problem(huge.to_dict(), ACCURACY) is None
    with pytest.raises(ConfigError, match="answer is tuple"):
        measure(metric_of("agreement"), nn.Identity(), [((1, 2), LABELS)], CPU, REFERENCE)


def margin(model, batches):
    """How far the right answer is above the mean of all."""
    return torch.cat([model(x)[range(len(x)), y] - model(x).mean(1) for x, y in batches])


def mean_margin(model, batches):
    for _ in batches:  # a second pass finds all of them again
        pass
    return float(margin(model, batches).mean())


def test_a_users_function_is_taken_itself_or_by_its_name():
    for chosen in (margin, "tests.test_metrics:margin"):
        found = score(chosen)
        assert found.metric.name == "tests.test_metrics:margin"
        assert (found.count, found.metric.label, found.metric.is_higher_better) == (4, "margin", True)
        torch.testing.assert_close(found.each, margin(SMALL, batches()))
        assert found.value == pytest.approx(float(found.each.mean()))
        lost = losses(found.metric, score(chosen, REFERENCE), found)
        assert float(lost.mean()) == pytest.approx(drop(score(chosen, REFERENCE), found), rel=1e-5)
    plain = score(mean_margin)
    assert (plain.each, plain.count) == (None, 4)
    assert plain.value == pytest.approx(found.value)
    assert losses(plain.metric, plain, plain) is None
    record = plain.to_dict()
    assert record == {"metric": "tests.test_metrics:mean_margin", "value": plain.value, "images": 4}
    assert described(record) == f"mean_margin {plain.value:.4g}"


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (math.nan, "returned nan for 4 inputs"),
        (math.inf, "returned inf"),
        (torch.tensor([1.0, math.nan, 0.0, 1.0]), "returned nan"),
        ("good", "returned str"),
        (None, "returned NoneType"),
        (True, "returned bool"),
        (torch.zeros(2, 2), r"returned a tensor of shape \(2, 2\)"),
        (torch.zeros(3), "returned 3 numbers for 4 inputs"),
        (10**400, "returned inf"),
    ],
)
def test_what_a_function_returns_is_checked(returned, told):
    def wrong(model, batches):
        list(batches)
        return returned

    with pytest.raises(ConfigError, match=rf"metric=tests.*wrong {told}.*returns a number, higher is better"):
        score(wrong)


@pytest.mark.parametrize("name", ["top1", "top5", "perplexity"])
def test_targets_that_are_no_numbers_of_classes_are_refused(name):
    one_hot = [(inputs, torch.eye(6)[labels]) for inputs, labels in batches()]
    with pytest.raises(DataError, match=rf"metric={name} needs .*shape \(3,\); they have shape \(3, 6\), .*argmax"):
        measure(METRICS[name], SMALL, one_hot, CPU, REFERENCE)
    pairs = [(inputs, labels.unsqueeze(1)) for inputs, labels in batches()]
    with pytest.raises(DataError, match=r"they have shape \(3, 1\), torch.int64$"):
        measure(METRICS[name], SMALL, pairs, CPU, REFERENCE)
    if name == "perplexity":
        for labels, told in (
            (LABELS.float(), r"they are torch.float32$"),
            (LABELS + 1, "a target is 6, .* 6 classes"),
        ):
            with pytest.raises(DataError, match=told):
                measure(METRICS[name], SMALL, batches(labels), CPU, REFERENCE)


def test_a_function_that_fails_or_is_missing_is_told():
    def broken(model, batches):
        raise KeyError("logits\nare gone")

    with pytest.raises(ConfigError, match=r"metric=.*broken failed: KeyError: 'logits.*are gone'; it gets \(model"):
        score(broken)
    for name, told in {
        "top2": "metric=top2: choose one of top1, .*did you mean top",
        "agrement": "did you mean agreement",
        "no_module_of_this_name:f": "cannot be imported .*PYTHONPATH",
        "tests.test_metrics:nothing": "cannot be imported",
        "tests.test_metrics:LABELS": "is Tensor, not a function",
    }.items():
        with pytest.raises(ConfigError, match=told):
            metric_of(name)


def test_the_same_numbers_as_ever_judge_by_default(context, reference):
    old, new = evaluate(reference, context.data, CPU), judged(METRICS["top1"], reference, context.data, CPU)
    assert old.to_dict() == new.to_dict() == {"top1": new.value, "top5": None, "images": 130}
    assert shown(new.to_dict()) == f"{100 * new.value:.2f} %"


def test_finetuning_keeps_the_state_that_the_metric_likes_best(reference):
    """A metric that likes the first state keeps it, and the opposite one does not."""

    def still(model, batches):
        return -float((model.linear.weight - start.linear.weight).abs().sum())

    start, kept = reference, {}
    settings = Finetuning(1, 50, 1e-2, held_out=20, evaluations=2, features=0.0, careful_below=0.0)
    for name, function in (("still", still), ("moving", lambda model, batches: -still(model, batches))):
        context, model = context_of(), copy.deepcopy(reference)
        object.__setattr__(context, "metric", metric_of(function))
        finetune(model, reference, settings, context, Progress(), "finetune")
        kept[name] = torch.equal(model.linear.weight, start.linear.weight)
    assert kept == {"still": True, "moving": False}


@pytest.mark.parametrize("name", ["cosine", "mse"])
def test_distillation_is_undone_by_a_metric_without_labels(context, reference, name):
    object.__setattr__(context, "metric", METRICS[name])
    images = lambda: context.data.calibration_batches(200, 200, CPU)  # noqa: E731
    start, worse = copy.deepcopy(reference.state_dict()), copy.deepcopy(reference)
    nn.init.normal_(worse.linear.weight)
    ruined = copy.deepcopy(worse.state_dict())
    for before in (start, ruined):
        keep_better_(worse, before, reference, images, context)
        assert all(torch.equal(value, start[key]) for key, value in worse.state_dict().items())


def test_the_settings_take_a_function_and_refuse_an_unknown_name():
    from tests.test_configs import composed

    config = read_config(composed() | {"metric": margin})
    assert config.judge().function is margin
    assert json.loads(json.dumps(config.settings["metric"])) == config.metric == "tests.test_metrics:margin"
    with pytest.raises(ConfigError, match="metric=top9: choose one of"):
        read_config(composed("metric=top9"))
    with pytest.raises(ConfigError, match=r"phase.export.accuracy_tolerance=2: .*top-1 is a share"):
        read_config(composed("phase=export", "phase.export.accuracy_tolerance=2"))
    read_config(composed("phase=export", "phase.export.accuracy_tolerance=2", "metric=mse"))


def test_an_unknown_name_in_a_record_is_a_function():
    assert scale_of("a.b:c").label == "c"
    assert scale_of("new").label == "new"
    assert problem({"metric": "a.b:c", "value": math.nan, "images": 3}, ACCURACY) is not None
