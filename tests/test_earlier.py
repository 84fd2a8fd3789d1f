"""Files that an earlier version wrote are still read, and its runs go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import tspc
from tests.test_tied_tables import Mostly

EARLIER = Path(__file__).parent / "earlier"
RUN = "synthetic/resnet8/rtk-0.05/seed0"
COMMAND = (
    *("dataset=synthetic", "dataset.options.train=200", "dataset.options.test=100", "model=resnet8"),
    *("pretrained=random", "phase=[decompose,finetune]", "method=rtk", "rate=0.05", "calibration.samples=32"),
    *("phase.finetune.steps=4", "phase.finetune.batch_size=20", "report=false"),
)
"""It made the run."""
ANSWERS = (
    (
        1.2700193,
        -1.8290943,
        -0.3552575,
        0.6951215,
        -0.5046916,
        -0.6654643,
        -1.7723802,
        -0.7646199,
        1.1545055,
        1.1701272,
    ),
    (
        2.0653024,
        -2.7595701,
        -0.2524805,
        0.3017509,
        -0.3742168,
        -0.4746352,
        -1.6637156,
        -1.1814454,
        1.0811822,
        1.4574563,
    ),
)
"""Of the earlier version."""


INTEGERS = "integers/resnet8-cp-size0.3.safetensors"
"""Factors in few bits beside batch norms in float32."""
OF_INTEGERS = (
    (0.712633, -0.737509, -0.38723, 0.266839, 0.008126, -0.643872, -0.536279, -0.253763, 0.507361, 0.494121),
    (1.987773, -2.098388, 0.008744, 0.792977, -0.807578, 0.187507, -1.060665, -0.587999, 0.77303, 1.396344),
)

BYTES = "synthetic/resnet8/cp-size0.06/seed0"
"""A run with vectors in float16 and statistics in 8 bits beside the factors."""
OF_BYTES = (
    (0.943623, -1.261984, -0.260017, 0.299291, 0.500151, -0.344828, -0.788385, -0.46972, 0.984222, 0.979217),
    (2.207068, -2.440805, 0.032149, 0.994571, -1.005889, -0.0446, -1.757937, -0.875665, 1.239992, 1.940149),
)


@pytest.fixture
def outputs(tmp_path) -> Path:
    return shutil.copytree(EARLIER, tmp_path / "outputs")


def test_a_network_of_an_earlier_version_answers_as_it_did():
    model = tspc.load(EARLIER / RUN / "model.safetensors").eval()
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model(x), torch.tensor(ANSWERS), atol=1e-5)


@pytest.mark.parametrize(("file", "answers"), [(INTEGERS, OF_INTEGERS), (f"{BYTES}/model.safetensors", OF_BYTES)])
def test_factors_in_few_bits_of_an_earlier_version_answer_as_they_did(file, answers):
    model = tspc.load(EARLIER / file).eval()
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model(x), torch.tensor(answers), atol=1e-5)


@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("basis/id-32.safetensors", (0.153429, 0.011023, -0.143389, -0.124272, 0.205872)),
        ("basis/id-5.safetensors", (0.153087, 0.012498, -0.14411, -0.123767, 0.207034)),
    ],
)
def test_layers_with_a_basis_of_an_earlier_version_answer_as_they_did(file, answers):
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip
    model = tspc.load(EARLIER / file, dense).eval()
    with torch.no_grad():
        found = model(torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8))
    assert torch.allclose(found, torch.tensor([answers]), atol=1e-5)


@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("tied/whole-3.safetensors", (0.633428, 2.190027, 3.550969, -0.0852, 0.871081)),
        ("tied/svd-4.safetensors", (0.561557, 2.698262, 2.664561, -0.093098, -0.492031)),
    ],
)
def test_shared_tables_in_few_bits_of_an_earlier_version_answer_as_they_did(file, answers):
    model = tspc.load(EARLIER / file, Mostly()).eval()
    with torch.no_grad():
        found = model(torch.arange(24).reshape(2, 12) * 7 % 400)
    assert torch.allclose(found[1, 3, :5], torch.tensor(answers), atol=1e-5)


def test_a_run_of_an_earlier_version_is_not_done_again(cli, outputs):
    before = {path.name: path.read_bytes() for path in (outputs / RUN).glob("*.safetensors")}
    code, out, err = cli(*COMMAND)
    assert (code, err) == (0, "")
    assert out.count("done before: 10.00 %") == 2
    after = {path.name: path.read_bytes() for path in (outputs / RUN).glob("*.safetensors")}
    for name in ("decompose.safetensors", "finetune.safetensors"):
        assert after[name] == before[name]


def test_a_run_in_few_bits_of_an_earlier_version_is_not_done_again(cli, outputs):
    others = (key for key in COMMAND if not key.startswith(("method=", "rate=")))
    code, out, err = cli(*others, "method=cp", "size=0.06")
    assert (code, err) == (0, "")
    assert out.count("done before: 9.00 %") == 2
    assert "18,168 bytes" in out


def test_another_setting_than_that_of_an_earlier_run_is_named(cli, outputs):
    code, _, err = cli(*COMMAND, "objective=macs")
    assert code == 1
    assert "objective: parameters → macs" in " ".join(err.split())


def test_comparisons_show_runs_of_an_earlier_version(cli, outputs):
    code, _, err = cli("phase=compare")
    assert (code, err) == (0, "")
    page = (outputs / "sweep.html").read_text()
    assert "rtk" in page
    assert "5,242" in page or "10.0" in page
