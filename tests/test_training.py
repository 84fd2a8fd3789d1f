"""The loop: schedules, recovery, signals, NaN, and evaluation."""

from __future__ import annotations

import copy
import errno
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.small import CPU, cross_entropy, network, recipe
from tspc.data import DataSpec, Feed, load_data
from tspc.errors import ConfigError, Interrupted, RunError, TrainingError
from tspc.models import NetworkSpec
from tspc.phases.batch_norm import rebase_, refit_norms_
from tspc.phases.finetune import train_classifier
from tspc.system import interrupts
from tspc.training import Hardware, Labelled, Progress, Watchers, evaluate, fit


def test_schedules():
    cosine, step = recipe(warmup=0.2), recipe(schedule="step")
    assert [round(cosine.rate_at(i, 10), 4) for i in range(3)] == [0.025, 0.05, 0.05]
    assert cosine.rate_at(9, 10) < 0.005
    assert [step.rate_at(i, 8) for i in (0, 3, 4, 5, 6, 7)] == pytest.approx([0.05, 0.05, 0.005, 0.005, 5e-4, 5e-4])
    assert recipe(schedule="constant").rate_at(7, 8) == 0.05


@pytest.mark.parametrize("key", ["epochs", "batch_size", "learning_rate", "momentum", "optimizer", "schedule"])
def test_recipes_out_of_range(key):
    bad = recipe(**{key: "lion" if key in ("optimizer", "schedule") else -1})
    assert [p.startswith(f"x.{key}=") for p in bad.problems("x")] == [True]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_learns(context, optimizer):
    model = network()
    before = evaluate(model, context.data, CPU)
    rate = 0.05 if optimizer == "sgd" else 2e-3
    train_classifier(model, recipe(epochs=6, optimizer=optimizer, learning_rate=rate), context, Progress(), "finetune")
    after = evaluate(model, context.data, CPU)
    assert after.top1 > max(0.4, before.top1 + 0.2)
    assert not model.training
    assert context.records[-1]["step"] == 24


@pytest.mark.parametrize("extra", [{}, {"average": 0.9, "held_out": 20, "clip": 1.0}, {"accumulate": 2}])
def test_an_interrupted_run_ends_with_the_same_weights(context, tmp_path, monkeypatch, extra):
    class Killed(Exception): ...

    def kill(step):
        if step.number == 10:
            raise Killed

    settings = recipe(epochs=4, **extra)
    whole, killed, resumed = network(), network(), network()
    train_classifier(whole, settings, context, Progress(), "finetune")
    path = tmp_path / "p.progress.pt"
    with monkeypatch.context() as patched:
        patched.setattr("tspc.phases.context.Watch._on_step", lambda self, step: kill(step))
        with pytest.raises(Killed):
            train_classifier(killed, settings, context, Progress(path, "settings", interval=0), "finetune")
    assert Progress(path, "settings").state_of(0)["step"] == 10, "in the middle of an epoch"
    # A learning rate that was measured goes on as it was, even where it would be measured otherwise today.
    measured_anew = replace(settings, learning_rate=2 * settings.learning_rate)
    train_classifier(resumed, measured_anew, context, Progress(path, "settings"), "finetune")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert Progress(path, "other settings").state_of(0) is None, "another run's progress is ignored"


@pytest.mark.parametrize("name", ["p.progress.pt", "progress.pt"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, name):
    path = tmp_path / name
    progress = Progress(path, "settings")
    progress.save(0, {"step": 1})
    progress.save(0, {"step": 2})
    assert Progress(path, "settings").state_of(0) == {"step": 2}
    path.write_bytes(path.read_bytes()[:100])
    found = Progress(path, "settings")
    assert found.state_of(0) == {"step": 1}
    assert f"{name} is damaged" in found.warning
    assert not path.exists(), "it would take the place of the good one at the next save"
    Progress.discard(path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    path = tmp_path / "p.progress.pt"
    progress = Progress(path, "settings")
    progress.save(0, {"step": 1})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("tspc.training.progress.torch.save", full)
        with pytest.raises(
            RunError, match=r"cannot write .*: No space left on device; free some space and run the same"
        ):
            progress.save(0, {"step": 2})
    assert Progress(path, "settings").state_of(0) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["p.progress.pt"]


def test_the_best_by_the_held_out_images_is_the_result(context):
    model, scores, states = network(), iter([0.2, 0.9, 0.3]), []

    def judge(judged):
        states.append({k: v.clone() for k, v in judged.state_dict().items()})
        return next(scores)

    fit(
        model.train(),
        Labelled(context.data, Feed(50, 0, CPU)),
        cross_entropy,
        recipe(steps=6, evaluations=2),
        Hardware(CPU),
        0,
        watchers=Watchers(judge=judge),
    )
    assert len(states) == 3, "before the first step, half-way, and at the end"
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("total", "evaluations"), [(9, 5), (10, 5), (3, 7), (7, 1)])
def test_a_network_is_judged_as_often_as_asked_and_once_before(context, total, evaluations):
    judged = []
    fit(
        network().train(),
        Labelled(context.data, Feed(50, 0, CPU)),
        lambda net, x, y: net.linear.weight.square().mean(),
        recipe(steps=total, evaluations=evaluations),
        Hardware(CPU),
        0,
        watchers=Watchers(lambda step: judged.append("step"), lambda net: float(judged.append("judge") is None)),
    )
    assert judged.count("judge") == min(evaluations, total) + 1
    assert (judged[0], judged[-1]) == ("judge", "judge")
    between = "".join("." if event == "step" else "|" for event in judged).strip("|").split("|")
    assert max(map(len, between)) - min(map(len, between)) <= 1, "at even distances"


def test_a_network_that_answers_nan_is_not_helped_by_a_smaller_learning_rate(context):
    model = network()
    with torch.no_grad():
        model.linear.bias[0] = torch.nan
    with pytest.raises(TrainingError, match=r"nan at step 1 of 8; this happens before any training: look at"):
        train_classifier(model, recipe(), context, Progress(), "finetune")


def test_accumulated_parts_make_one_step(context):
    parts, whole = (nn.Sequential(nn.Flatten(), nn.Linear(768, 10)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    for model, count in ((whole, 1), (parts, 3)):
        batches = Labelled(context.data, Feed(50, 0, CPU))
        fit(model, batches, cross_entropy, recipe(steps=3, accumulate=count), Hardware(CPU), 0)
    torch.testing.assert_close(list(parts.parameters()), list(whole.parameters()))


@pytest.mark.parametrize("name", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_trains(context, name):
    model = network().train()
    before = evaluate(model, context.data, CPU).top1
    batches = Labelled(context.data, Feed(50, 0, CPU))
    fit(model, batches, cross_entropy, recipe(epochs=3), Hardware(CPU, getattr(torch, name)), 0)
    assert next(model.parameters()).dtype == torch.float32
    assert evaluate(model, context.data, CPU).top1 > before


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 5), (signal.SIGINT, 5), (signal.SIGTERM, 8)])
def test_a_signal_finishes_the_step_and_saves(context, tmp_path, monkeypatch, number, step):
    path = tmp_path / "p.progress.pt"
    monkeypatch.setattr(
        "tspc.phases.context.Watch._on_step",
        lambda self, told: told.number == step - 1 and os.kill(os.getpid(), number),
    )
    with interrupts.handled(), pytest.raises(Interrupted, match=f"after step {step} of 8, which is saved; the same"):
        train_classifier(network(), recipe(), context, Progress(path, "settings"), "finetune")
    assert Progress(path, "settings").state_of(0)["step"] == step


def test_a_signal_elsewhere_stops_at_once():
    with interrupts.handled(), pytest.raises(Interrupted, match="^stopped by SIGTERM; the same command"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nan_stops(context):
    with pytest.raises(
        TrainingError, match=r"the loss became .* at step \d+ of 8; lower the learning rate \(learning_rate="
    ):
        train_classifier(network(), recipe(learning_rate=1e18), context, Progress(), "finetune")


def test_weights_that_end_non_finite_are_no_result(context):
    model = network().train()
    steep = recipe(steps=1, learning_rate=1e30, momentum=0.0)
    batches = Labelled(context.data, Feed(50, 0, CPU))
    with pytest.raises(TrainingError, match="the weights are no longer finite before step 2"):
        fit(model, batches, lambda net, x, y: 1e20 * net(x).square().sum(), steep, Hardware(CPU), 0)


def test_plain_sgd_without_momentum(context):
    train_classifier(network(), recipe(steps=1, momentum=0.0), context, Progress(), "finetune")


def test_evaluation_counts_every_image_once(context):
    model = network()
    reference = evaluate(model, context.data, CPU, batch_size=130)
    assert reference.images == 130
    assert reference.top5 is None
    for batch_size in (1, 7, 64):
        assert evaluate(model, context.data, CPU, batch_size=batch_size) == reference
    assert evaluate(model, context.data, CPU, limit=20).images == 20


def test_top5_from_100_classes_on():
    data = load_data(DataSpec("synthetic", "s", 100, 3, 16, (0.5,), (0.25,), options={"train": 10, "test": 50}))
    right = evaluate(NetworkSpec("builtin", "resnet8", 100).build(), data, CPU)
    assert right.top5 is not None
    assert right.top1 <= right.top5 <= 1


def test_wrong_number_of_outputs(context):
    with pytest.raises(ConfigError, match="10 classes"):
        evaluate(NetworkSpec("builtin", "resnet8", 12).build(), context.data, CPU)


def test_refitted_batch_norms_answer_most_like_the_references():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 9, 9)
    reference = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    reference(x)
    reference.eval()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn_like(model[0].weight)
        model[3].weight *= 0.3
        refit_norms_(
            model, reference, lambda: [network(part) for part in x.split(16) for network in (model, reference)]
        )
        answer, wanted = model(x), reference(x)
    # No other line through the points of a channel is closer: the rest has no mean, and nothing to do with the answer.
    rest, centred = wanted - answer, answer - answer.mean((0, 2, 3), keepdim=True)
    assert float(rest.mean((0, 2, 3)).abs().max()) < 1e-4
    assert float((rest * centred).mean((0, 2, 3)).abs().max()) < 1e-3
    assert float(rest.square().mean()) < 0.5
    torch.testing.assert_close(model[4].running_mean, model[3](model[:3](x)).mean((0, 2, 3)))


def test_rebased_batch_norms_answer_the_same_and_train_from_there():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4, affine=False)
    first, second = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)], [nn.Conv2d(6, 4, 3), plain, nn.BatchNorm2d(4)]
    model = nn.Sequential(*first, nn.ReLU(), *second)
    x = torch.randn(32, 3, 9, 9)
    with torch.no_grad():
        model(x)  # statistics that are not those of the batch
        for norm in (model[1], model[5]):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
            norm.running_var *= 9
    model.eval()
    wanted, before = model(x), plain.running_var.clone()
    rebase_(model, lambda: [model(part) for part in x.split(8)])
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert not model.training
    torch.testing.assert_close(plain.running_var, before)
    head = model[:2].train()
    torch.testing.assert_close(head(x), head.eval()(x), rtol=1e-3, atol=1e-4)
    assert float(model[1].running_var.mean()) < 1
