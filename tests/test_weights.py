"""Weights of odd kinds: what is no plain table of real numbers is named, and not taken for something else."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

import tspc
from tspc.calibration.samples import Calibration
from tspc.errors import DecompositionError, WeightsError
from tspc.models import NetworkSpec
from tspc.models.weights import load_state, read_state

SPEC = NetworkSpec("builtin", "resnet8", 10, 1, 8)
KIND = {
    "sparse": lambda t: t.to_sparse(),
    "compressed rows": lambda t: t.to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "on the meta device": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1, :5]]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KIND)
def test_tensors_of_other_layouts_are_named(kind, tmp_path):
    state = dict(SPEC.build().state_dict())
    state["linear.weight"] = KIND[kind](state["linear.weight"])
    torch.save(state, tmp_path / "w.pt")
    said = "sparse" if kind == "compressed rows" else kind
    with pytest.raises(WeightsError, match=rf"w\.pt: linear\.weight is {said}.*; save plain tensors"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.complex64, "complex"), (torch.bool, "true or false"), (torch.int32, "whole")]
)
def test_numbers_of_another_kind_are_refused_and_leave_the_network_as_it_was(dtype, said):
    model = SPEC.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(dtype)
    with pytest.raises(WeightsError, match=f"another kind of numbers: layer1.0.conv1.weight {said} instead of real"):
        load_state(model, state, "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_real_numbers_of_any_precision_are_taken(dtype):
    model = SPEC.build()
    state = {name: (value + 1).to(dtype) for name, value in SPEC.build().state_dict().items()}  # counters too
    load_state(model, state, "w.pt")
    assert torch.equal(model.linear.weight, state["linear.weight"].float())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_later_pickle_protocols_are_named(protocol, zipped, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(SPEC.build().state_dict(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        WeightsError, match=r"w\.pt is a pickle of protocol 4 or later.* torch\.save\(state_dict, FILE\)"
    ):
        read_state(path)
    path.write_bytes(pickle.dumps({"a": torch.zeros(2)}, protocol=protocol))
    with pytest.raises(WeightsError, match="protocol 4 or later"):
        read_state(path)


@pytest.mark.parametrize("state", [{}, {"state_dict": {}}, {"a": None}, [torch.zeros(2)], torch.zeros(2), 3])
def test_files_without_a_state_dict(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("conv1.weight", math.nan, "holds NaN or infinite values"),
        ("linear.bias", math.inf, "holds NaN or infinite values"),
        ("bn1.running_mean", math.nan, "holds NaN or infinite values"),
        ("bn1.running_var", -1.0, "holds negative variances"),
        ("layer1.0.conv1.weight", math.nan, "holds NaN or infinite values"),
    ],
)
def test_wrong_values_are_named_where_they_are(name, value, said, calibrated):
    """Also in a layer that stays dense, whose output would make a later layer's kernel NaN."""
    model = SPEC.build()
    model.state_dict()[name].view(-1)[-1] = value
    images = torch.randn(8, 1, 8, 8) if calibrated else None
    with pytest.raises(DecompositionError, match=f"^{name} {said}; mend the weights first"):
        tspc.compress(model, "svd", 0.5, calibration=images, settings=Calibration(samples=8, batch_size=4))


def test_masks_may_hold_infinities():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_buffer("mask", torch.full((8, 8), -math.inf).triu(1))
    assert torch.equal(tspc.compress(model, "svd", 0.5).mask, model.mask)
