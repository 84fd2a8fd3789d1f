"""What distillation and finetuning train, and that they go on where they were stopped."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.small import CPU, network
from tspc.calibration.samples import Calibration
from tspc.compression.compress import compress
from tspc.phases.agreement import keep_better_
from tspc.phases.distill import Distillation, distill
from tspc.phases.finetune import Finetuning, finetune, relative_error
from tspc.phases.refit import adapted_layers, refit_
from tspc.training import Progress, evaluate
from tspc.traversal.hooks import outputs_of

DISTILLATION = Distillation(4, 25, 2e-3, images=200, held_out=0, evaluations=5)


def distance(model, reference, images):
    with torch.no_grad():
        return float(F.mse_loss(model.eval()(images), reference.eval()(images)))


def block_error(model, reference, images):
    with torch.no_grad(), outputs_of(model.eval(), ["layer3.0"]) as ours, outputs_of(reference, ["layer3.0"]) as theirs:
        model(images)
        reference(images)
        return float(relative_error(ours["layer3.0"], theirs["layer3.0"]))


@pytest.mark.parametrize(
    "change",
    [
        {"batch_norm": "frozen"},
        {"inputs": "mixed"},
        {"memory": 0},
        pytest.param({"inputs": "parallel"}, marks=pytest.mark.slow),
    ],
)
def test_distillation_brings_the_activations_closer(context, reference, change):
    model = compress(reference, "tk", 0.3, allocation="uniform")
    images, _ = next(context.data.test_batches(130, CPU))
    stem = model.conv1.weight.clone()
    before = distance(model, reference, images)
    distill(model, reference, replace(DISTILLATION, **change), context, Progress())
    assert distance(model, reference, images) < 0.7 * before
    assert torch.equal(model.conv1.weight, stem), "layers outside the blocks stay as they are"
    assert all(p.requires_grad for p in model.parameters())


def test_a_block_is_never_left_worse_than_it_was(context, reference):
    model = compress(reference, "tk", 0.3, allocation="uniform").eval()
    images = next(context.data.calibration_batches(200, 200, CPU))
    before, error = {k: v.clone() for k, v in model.state_dict().items()}, block_error(model, reference, images)
    ruinous = replace(DISTILLATION, steps=4, optimizer="sgd", learning_rate=5.0, blocks="layer3.0")
    distill(model, reference, ruinous, context, Progress())
    # All that is left of it are its batch norms in closed form, which come before the steps.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "bn" not in k)
    assert block_error(model, reference, images) < error


def test_a_layer_that_made_up_for_others_is_solved_anew(context, reference):
    images = next(context.data.calibration_batches(200, 200, CPU))
    settings = Calibration(samples=200)
    model = compress(reference, "svd", 0.2, allocation="uniform", calibration=images, settings=settings)
    assert adapted_layers(model, reference) == ["linear"]
    stale, head = copy.deepcopy(model), copy.deepcopy(model.linear)
    distill(model, reference, DISTILLATION, context, Progress())
    assert not torch.equal(model.linear.weight, head.weight)
    stale.load_state_dict(model.state_dict())
    stale.linear.load_state_dict(head.state_dict())
    assert distance(model, reference, images) < 0.8 * distance(stale, reference, images)
    assert "linear" in {record["block"] for record in context.records if record["phase"] == "distill"}


def test_a_block_is_done_when_its_loss_no_longer_falls(context, reference):
    model = compress(reference, "tk", 0.3, allocation="uniform")
    distill(model, reference, replace(DISTILLATION, steps=300, learning_rate=1e-9, least_gain=0.5), context, Progress())
    steps = {record["block"]: record["step"] for record in context.records if record["phase"] == "distill"}
    assert len(steps) == 3
    assert max(steps.values()) <= 20


def test_activations_too_large_for_float16_are_distilled(context):
    """7e4 is infinite in float16, and so would be the loss."""

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.block(self.stem(x) * 1e6).mean((2, 3)))

    torch.manual_seed(0)
    reference = Loud().eval()
    model = compress(reference, "svd", 0.3, allocation="uniform")
    images, _ = next(context.data.test_batches(130, CPU))
    with torch.no_grad():
        assert float(reference.block(reference.stem(images) * 1e6).abs().max()) > 7e4
    before = distance(model, reference, images)
    distill(model, reference, replace(DISTILLATION, blocks="block", steps=20, learning_rate=1e-2), context, Progress())
    assert distance(model, reference, images) < 0.9 * before


def test_a_network_that_calls_its_blocks_twice_is_distilled_as_a_whole(context):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.block(self.block(self.stem(x)).relu()).mean((2, 3)))

    torch.manual_seed(0)
    reference = Twice().eval()
    model = compress(reference, "svd", 0.3, allocation="uniform")
    images, _ = next(context.data.test_batches(130, CPU))
    before = distance(model, reference, images)
    distill(model, reference, DISTILLATION, context, Progress())
    assert distance(model, reference, images) < before


def test_layers_are_not_solved_where_that_would_be_wrong(context, reference):
    """From the reference's inputs a layer would be the reference's, and named blocks are all that is touched."""
    images = next(context.data.calibration_batches(200, 200, CPU))
    settings = Calibration(samples=200)
    model = compress(reference, "svd", 0.2, allocation="uniform", calibration=images, settings=settings)
    head = model.linear.weight.clone()
    for change in ({"inputs": "parallel"}, {"blocks": "layer3.0"}):
        small = copy.deepcopy(model)
        distill(small, reference, replace(DISTILLATION, steps=2, **change), context, Progress())
        assert torch.equal(small.linear.weight, head)


def test_a_network_is_not_left_further_from_the_reference(context, reference):
    images = lambda: context.data.calibration_batches(200, 200, CPU)  # noqa: E731
    start = copy.deepcopy(reference.state_dict())
    worse = copy.deepcopy(reference)
    nn.init.normal_(worse.linear.weight)
    ruined = copy.deepcopy(worse.state_dict())
    keep_better_(worse, start, reference, images, context)
    assert all(torch.equal(value, start[key]) for key, value in worse.state_dict().items())
    keep_better_(worse, ruined, reference, images, context)
    assert all(torch.equal(value, start[key]) for key, value in worse.state_dict().items()), "the better one stays"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (16, 6)),
        (nn.Linear(6, 4, bias=False), (16, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (16, 4, 9, 9)),
        (nn.Conv1d(3, 5, 3, padding=1), (16, 3, 20)),
    ],
)
def test_a_layer_is_solved_from_what_it_should_answer(layer, shape):
    torch.manual_seed(0)
    original, wanted = copy.deepcopy(layer), copy.deepcopy(layer)
    for parameter in wanted.parameters():
        nn.init.normal_(parameter)
    batches = [torch.randn(shape) for _ in range(8)]
    with torch.no_grad():
        pairs = [(x, wanted(x), []) for x in batches]
    refit_(layer, original, pairs, len(batches))
    with torch.no_grad():
        error = relative_error(layer(batches[0]), pairs[0][1])
    # A small damping holds it at the original.
    assert float(error) < 1e-3


def test_distilling_a_block_leaves_the_others_alone(context):
    reference = network().eval()
    model = compress(reference, "tk", 0.3, allocation="uniform")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = replace(DISTILLATION, blocks="layer2.0")
    distill(model, reference, settings, context, Progress())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("layer2.0") for k in changed)


def test_nothing_is_left_hooked(context):
    reference = network().eval()
    model = compress(reference, "svd", 0.3, allocation="uniform")
    distill(model, reference, replace(DISTILLATION, steps=1), context, Progress())
    assert not any(m._forward_hooks for net in (model, reference) for m in net.modules())
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


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
    distill(model, reference, replace(DISTILLATION, blocks="block"), context, Progress())
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("change", [{"distillation": 1.0}, {"distillation": 0.0}, {"features": 1.0}])
def test_finetuning_restores_accuracy(context, reference, change):
    model = compress(reference, "tk", 0.1, allocation="uniform")
    before = evaluate(model, context.data, CPU).top1
    settings = Finetuning(5, 50, 3e-3, **{"held_out": 20, "features": 0.0, "warmup": 0.0} | change)
    finetune(model, reference, settings, context, Progress(), "finetune")
    assert evaluate(model, context.data, CPU).top1 > before
    assert not any(m._forward_hooks for net in (model, reference) for m in net.modules())
    assert all(p.grad is None for p in reference.parameters())


def finetuned_notes(model, reference, context, **changes):
    notes = []
    settings = Finetuning(
        1, 50, 1e-3, steps=4, schedule="constant", **{"features": 0.0, "held_out": 0, "warmup": 0.0} | changes
    )
    finetune(copy.deepcopy(model), reference, settings, replace(context, note=notes.append), Progress(), "finetune")
    (rate,) = {note["learning_rate"] for note in notes if "step" in note}
    return rate, [note["apart"] for note in notes if note.get("event") == "careful"]


def test_a_network_close_to_the_reference_is_finetuned_in_small_steps(context, reference):
    assert finetuned_notes(network(), reference, context) == (1e-3, [])
    rate, (apart,) = finetuned_notes(reference, reference, context)
    assert apart == 0
    assert rate == pytest.approx(1e-3 * 0.01 / 0.3)
    assert finetuned_notes(reference, reference, context, careful_below=0.0) == (1e-3, [])
    assert finetuned_notes(reference, reference, context, distillation=0.0, features=0.0) == (1e-3, [])
    near = compress(reference, "tk", 0.3, calibration=next(context.data.calibration_batches(200, 200, CPU)))
    rate, (apart,) = finetuned_notes(near, reference, context, careful_below=1.0)
    assert 0.01 < apart < 1
    assert rate == pytest.approx(1e-3 * apart)


def test_agreement_by_chance_is_no_closeness(context, reference):
    class Constant(nn.Module):
        """The last class, whatever the image: a network that has collapsed."""

        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x) * 1e-6 + torch.arange(10.0)

    rate, told = finetuned_notes(Constant(reference), Constant(reference), context)
    assert (rate, told) == (1e-3, []), "where all images are of one class, nothing is known"
