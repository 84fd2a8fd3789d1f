"""Slow: a few networks of the sweep in `benchmarks.networks`, every check of it."""

from __future__ import annotations

import pytest
import torch

import tspc
from benchmarks.networks import CASES, examine, row
from tspc.decompositions import METHODS

BY_NAME = {case.name: case for case in CASES}


def test_the_sweep_has_thirty_networks_of_torchvision():
    from torchvision import models

    names = [case.name for case in CASES if case.family == "torchvision"]
    assert len(set(names)) == 30
    assert set(names) <= set(models.list_models(module=models))
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.slow
# The one has batch norms, sums and depthwise convolutions, the other biases and concatenations.
@pytest.mark.parametrize(("name", "method"), [("mnasnet0_5", "svd"), ("squeezenet1_1", "tt")])
def test_a_network_passes_every_check(name, method, tmp_path):
    result = examine(BY_NAME[name], method, tmp_path)
    assert result["failures"] == []
    assert result["rate"] <= 0.3
    assert result["tensorized"] > 0
    assert max(result["rebuilt"], result["onnx"]) <= 1e-4
    assert row(BY_NAME[name], {method: result})[3] == f"1/{len(METHODS)} (1 run)"


@pytest.mark.slow
def test_a_detector_with_a_compressed_backbone_still_detects(tmp_path):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    def detector():
        torch.manual_seed(0)
        return fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0).eval()

    small = detector()
    before = sum(p.numel() for p in small.backbone.body.parameters())
    small.backbone.body = tspc.compress(small.backbone.body, "svd", 0.5, calibration=torch.rand(4, 3, 64, 64))
    assert sum(p.numel() for p in small.backbone.body.parameters()) < 0.6 * before
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    with torch.no_grad():
        assert [set(found) for found in small(images)] == [{"boxes", "labels", "scores"}] * 2
        tspc.save(small, tmp_path / "small.safetensors")
        loaded = tspc.load(tmp_path / "small.safetensors", model=detector()).eval()
        for ours, theirs in zip(small(images), loaded(images), strict=True):
            assert len(ours["boxes"]) > 0
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_a_segmentation_network_keeps_its_map():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    small = tspc.compress(model, "tk", 0.5, calibration=torch.rand(2, 3, 64, 64))
    before, after = (sum(p.numel() for p in network.parameters()) for network in (model, small))
    assert after < 0.6 * before
    with torch.no_grad():
        assert small(torch.rand(1, 3, 64, 64))["out"].shape == (1, 21, 64, 64)
