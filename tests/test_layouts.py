"""Networks that cannot take images with their channels last are run on contiguous ones, through all phases."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import TINY
from tspc.training import tried
from tspc.training.placement import place

NETWORK = """
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc1, self.fc2 = nn.BatchNorm2d(8), nn.Linear(8 * 4 * 4, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv2(F.relu(self.conv1(x))))), 4)
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))
"""
ONLY_CONTIGUOUS = "Net runs on contiguous images: channels last would be faster, but then it fails (view size is not"


@pytest.mark.parametrize("method", ["svd", "rcp"])
def test_a_network_that_views_what_a_convolution_answers_goes_through_all_phases(cli, tmp_path, monkeypatch, method):
    (tmp_path / f"views_{method}.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("model=custom", f"model.factory=views_{method}:Net")
    more = ("phase=[pretrain,plan,decompose,distill,finetune,benchmark]", "phase.distill.steps=2")
    timing = ("phase.benchmark.runtimes=[eager]", "phase.benchmark.batch_sizes=[2]", "phase.benchmark.seconds=0.01")
    code, out, err = cli(
        *own, *TINY, *more, *timing, f"method={method}", "rate=0.6", "calibration.samples=16", "phase.distill.images=64"
    )
    assert (code, err) == (0, "")
    assert out.count(ONLY_CONTIGUOUS) == 1, "said once"
    (path,) = tmp_path.glob("outputs/synthetic/Net/*/seed0/result.json")
    assert list(json.loads(path.read_text())["phases"]) == ["decompose", "distill", "finetune"]


def test_without_data_the_layout_is_tried_on_random_images(cli, tmp_path, monkeypatch):
    (tmp_path / "views_alone.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("model=custom", "model.factory=views_alone:Net", "dataset.image_size=16", "rate=0.6")
    code, out, err = cli(*own, "phase=[decompose,export]", "phase.export.formats=[pt2]", "report=false")
    assert (code, err) == (0, "")
    assert out.count(ONLY_CONTIGUOUS) == 1


class Strided(nn.Module):
    """Goes by the strides, so that it answers otherwise with the channels last, without an error."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.as_strided((len(y), 4), (y[0].numel(), 1))


class ViewsInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return self.fc(y.view(len(y), -1) if self.training else y.flatten(1))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_other_answers_are_a_reason_too():
    trial = tried(Strided(), IMAGES, trains=False)
    assert (trial.layout, trial.reason) == (torch.contiguous_format, "its answers differ")


def test_training_mode_is_tried_where_the_network_is_trained_and_leaves_no_trace():
    model = ViewsInTraining().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    assert tried(model, IMAGES, trains=False).layout == torch.channels_last
    trial = tried(model, IMAGES, trains=True)
    assert trial.layout == torch.contiguous_format
    assert "view size" in trial.reason
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(trial.answer, place(model, torch.device("cpu"), trial.layout)(IMAGES))


def test_images_of_another_size_than_the_setting_are_refused(cli):
    code, _, err = cli("dataset.image_size=32", "dataset.pad=1")
    assert (code, err) == (1, "tspc: dataset.image_size=32, but digits has images of 8×8 pixels\n")
