"""The loop: schedules, recovery, NaN, evaluation, and what distillation trains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tspc.compression import compress
from tspc.data import DataSpec, load_data
from tspc.display import Display
from tspc.errors import ConfigError, TrainingError
from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.phases.distill import Distillation, distill
from tspc.phases.finetune import train_classifier
from tspc.training import Progress, Recipe, evaluate, fit

CPU = torch.device("cpu")
SPEC = DataSpec("synthetic", "s", 10, 3, 16, (0.5,), (0.25,), options={"train": 200, "test": 130})


@pytest.fixture
def context():
    records = []
    made = Context(load_data(SPEC), CPU, 0, Display(), records.append)
    object.__setattr__(made, "records", records)
    return made


def network() -> nn.Module:
    torch.manual_seed(0)
    return NetworkSpec("builtin", "resnet8", 10).build()


def recipe(**changes) -> Recipe:
    return Recipe(**{"epochs": 2, "batch_size": 50, "learning_rate": 0.05} | changes)


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


def test_an_interrupted_run_ends_with_the_same_weights(context, tmp_path):
    whole, interrupted = network(), network()
    train_classifier(whole, recipe(epochs=4), context, Progress(), "finetune")

    class Killed(Exception): ...

    def kill(step):
        if step.number == 10:
            raise Killed

    data = context.data
    model = interrupted.train()
    loss_of = lambda x, y: F.cross_entropy(model(x), y)  # noqa: E731
    progress = Progress(tmp_path / "p.pt", "settings", interval=0)
    with pytest.raises(Killed):
        fit(model, model.parameters(), loss_of, data, recipe(epochs=4), CPU, 0, progress=progress, on_step=kill)
    resumed = network()
    train_classifier(resumed, recipe(epochs=4), context, Progress(tmp_path / "p.pt", "settings"), "finetune")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert Progress(tmp_path / "p.pt", "other settings").restore(resumed) == 0, "another run's progress is ignored"
    (tmp_path / "p.pt").write_bytes(b"damaged")
    assert Progress(tmp_path / "p.pt", "settings").restore(resumed) == 0


def test_nan_stops(context):
    with pytest.raises(TrainingError, match=r"the loss became .* at step \d+ of 8; lower the learning rate"):
        train_classifier(network(), recipe(learning_rate=1e18), context, Progress(), "finetune")


def test_weights_that_end_non_finite_are_no_result(context):
    model = network().train()
    steep = recipe(steps=1, learning_rate=1e30, momentum=0.0)
    with pytest.raises(TrainingError, match="the weights stopped being finite in epoch 1"):
        fit(model, model.parameters(), lambda x, y: 1e20 * model(x).square().sum(), context.data, steep, CPU, 0)


def test_plain_sgd_without_momentum(context):
    train_classifier(network(), recipe(steps=1, momentum=0.0), context, Progress(), "finetune")


def test_dropout_stays_off_in_distillation(context):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.9))
            self.last = nn.Linear(8, 10)

        def forward(self, x):
            return self.last(self.block(self.first(x)).mean((2, 3)))

    reference = Net().eval()
    model = compress(reference, "svd", 0.5, allocation="uniform")
    seen = []
    model.block[2].register_forward_hook(lambda module, args, output: seen.append(module.training))
    distill(model, reference, Distillation(1, 100, 1e-3, blocks="block", optimizer="adam"), context, Progress())
    assert seen
    assert not any(seen)


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


@pytest.mark.parametrize("batch_norm", ["frozen", "updated"])
def test_distillation_brings_the_activations_closer(context, batch_norm):
    reference = network()
    train_classifier(reference, recipe(epochs=4), context, Progress(), "pretrain")
    model = compress(reference, "tk", 0.3, allocation="uniform")
    images, _ = next(context.data.test_batches(130, CPU))

    def distance():
        with torch.no_grad():
            return float(F.mse_loss(model.eval()(images), reference(images)))

    stem = model.conv1.weight.clone()
    before = distance()
    settings = Distillation(6, 50, 2e-3, optimizer="adam", schedule="constant", batch_norm=batch_norm)
    distill(model, reference, settings, context, Progress())
    assert distance() < 0.7 * before
    assert torch.equal(model.conv1.weight, stem), "layers outside the blocks stay as they are"
    assert all(p.requires_grad for p in model.parameters())


def test_distilling_a_block_leaves_the_others_alone(context):
    reference = network().eval()
    model = compress(reference, "tk", 0.3, allocation="uniform")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = Distillation(1, 50, 1e-3, blocks="layer2.0", optimizer="adam")
    distill(model, reference, settings, context, Progress())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("layer2.0") for k in changed)


def test_nothing_is_left_hooked(context):
    reference = network().eval()
    model = compress(reference, "svd", 0.3, allocation="uniform")
    distill(model, reference, Distillation(1, 100, 1e-3, optimizer="adam"), context, Progress())
    assert not any(m._forward_hooks for net in (model, reference) for m in net.modules())
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
