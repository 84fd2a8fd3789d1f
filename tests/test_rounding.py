"""Factors on grids that are trained as numbers are rounded again, in function space."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.small import CPU
from tests.test_phases import DISTILLATION, distance
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.compress import compress
from tspc.compression.integers import on_grids
from tspc.compression.rounding import put_on_grids_
from tspc.layers.forms import tensorized_layers
from tspc.phases.distill import distill
from tspc.training import Progress
from tspc.traversal.copying import copied


@pytest.mark.parametrize("method", ["svd", pytest.param("rcp", marks=pytest.mark.slow)])
def test_distillation_of_factors_on_grids_ends_on_grids(context, reference, method):
    images, _ = next(context.data.test_batches(130, CPU))
    model = compress(reference, method, 0.2, allocation="uniform", bits=5)
    before, widths = distance(model, reference, images), {name: x.bits for name, x in on_grids(model).items()}
    stem = model.conv1.weight.clone()
    distill(model, reference, DISTILLATION, context, Progress(), Calibration(samples=100))
    assert distance(model, reference, images) < before
    assert {name: x.bits for name, x in on_grids(model).items()} == widths
    assert not torch.equal(model.conv1.weight, stem), "a whole kernel on a grid makes up for nothing, but is trained"
    for layer in on_grids(model).values():
        for factor, grid in zip(layer.factor_tensors(), layer.grids, strict=True):
            assert torch.allclose(grid.rounded(factor), factor, rtol=1e-5)


def test_rounding_that_loses_more_than_training_gained_is_undone(context, reference):
    data = next(context.data.calibration_batches(200, 200, CPU))
    model = compress(reference, "svd", 0.4, allocation="uniform", bits=6, calibration=data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ruinous = replace(DISTILLATION, steps=2, learning_rate=1e-9, batch_norm="frozen", held_out=20)
    distill(model, reference, ruinous, context, Progress(), Calibration(samples=0))  # rounds to nearest
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(record.get("event") == "undone" for record in context.records)


def test_only_the_factors_of_named_blocks_leave_their_grids(context, reference):
    model = compress(reference, "svd", 0.4, allocation="uniform", bits=4)
    before = {name: value.clone() for name, value in model.state_dict().items() if "layer3" not in name}
    settings = replace(DISTILLATION, blocks="layer3.0", steps=3)
    distill(model, reference, settings, context, Progress(), Calibration(samples=50))
    vectors = ("bn", "running", "num_batches", "bias")
    kept = {name: v for name, v in before.items() if not any(word in name for word in vectors)}
    assert kept
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())


def test_rounding_in_function_space_loses_less_than_rounding_to_nearest(context, reference):
    images, _ = next(context.data.test_batches(130, CPU))
    data = next(context.data.calibration_batches(200, 200, CPU))
    trained = compress(reference, "svd", 0.5, allocation="uniform", calibration=data).eval()
    errors = []
    with Samples(data, Calibration(samples=200)) as given:
        for samples in (None, given):
            model = copied(trained)
            put_on_grids_(model, reference, dict.fromkeys(tensorized_layers(model), 4), samples)
            assert {layer.bits for layer in on_grids(model).values()} == {4}
            errors.append(distance(model, trained, images))
    assert errors[1] < 0.7 * errors[0]
