"""What is saved is what is loaded; what cannot be loaded says why and runs nothing."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from torch import nn

import tspc
from tspc.decompositions import METHODS
from tspc.errors import RunError, WeightsError
from tspc.models import NetworkSpec
from tspc.models.safe_files import read_tensors, write_tensors
from tspc.models.weights import load_state, read_state
from tspc.store.files import write_atomically

SPEC = NetworkSpec("builtin", "resnet8", 10)


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(name, tmp_path):
    small = tspc.compress(SPEC.build(), name, 0.3, allocation="uniform").eval()
    path = tmp_path / "small.safetensors"
    tspc.save(small, path, network=SPEC)
    x = torch.randn(2, 3, 32, 32)
    for loaded in (tspc.load(path), tspc.load(path, model=SPEC.build())):
        assert torch.equal(loaded.eval()(x), small(x))
        assert [p.shape for p in loaded.parameters()] == [p.shape for p in small.parameters()]


def test_a_loaded_network_is_in_the_mode_that_it_was_given_in(tmp_path):
    small = tspc.compress(SPEC.build(), "svd", 0.3, allocation="uniform")
    tspc.save(small, tmp_path / "a.safetensors")
    for mode in (True, False):
        loaded = tspc.load(tmp_path / "a.safetensors", SPEC.build().train(mode))
        assert {module.training for module in loaded.modules()} == {mode}


def test_loading_leaves_the_random_state_alone(tmp_path):
    tspc.save(SPEC.build(), tmp_path / "a.safetensors", network=SPEC)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tspc.load(tmp_path / "a.safetensors")
    assert torch.equal(torch.rand(1), expected)


def test_the_same_network_gives_the_same_bytes_every_time(tmp_path):
    state, files = {'a "ü"\n': torch.ones(2), "b": torch.zeros(0)}, set()
    for _ in range(8):
        write_tensors(tmp_path / "a.safetensors", state, '{"format": 1}')
        files.add((tmp_path / "a.safetensors").read_bytes())
    assert len(files) == 1
    found = read_tensors(tmp_path / "a.safetensors")
    assert (found.header, set(found.names)) == ('{"format": 1}', set(state))


def test_an_older_file_with_a_tied_weight_twice_loads_also_with_nan(tmp_path):
    def network() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        return model

    model, path = network(), tmp_path / "model.safetensors"
    with torch.no_grad():
        model[0].weight[2, 3] = float("nan")
    tspc.save(model, path)
    file = read_tensors(path)
    header = json.loads(file.header or "")
    tensors = dict(file.tensors)
    for name, first in header.pop("tied").items():
        tensors[name] = tensors[first].clone()
    write_tensors(path, tensors, json.dumps(header))
    torch.testing.assert_close(tspc.load(path, network())[1].weight, model[0].weight, equal_nan=True)


def test_tied_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    tspc.save(model, tmp_path / "a.safetensors")
    loaded = tspc.load(tmp_path / "a.safetensors", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert torch.equal(loaded[1].weight, model[0].weight)


def test_wrong_architecture(tmp_path):
    path = tmp_path / "a.safetensors"
    tspc.save(tspc.compress(SPEC.build(), "tt", 0.3, allocation="uniform"), path)
    with pytest.raises(WeightsError, match="does not describe a built-in network"):
        tspc.load(path)
    with pytest.raises(WeightsError, match=r"layer layer1.0.conv1 .* no such layer"):
        tspc.load(path, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "foreign"])
def test_damaged_files(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    tspc.save(SPEC.build(), path, network=SPEC)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("hello")
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="a.safetensors"):
        tspc.load(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".safetensors"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_in_their_usual_wrappings(suffix, wrapper, prefix, tmp_path):
    from safetensors.torch import save_file

    source = SPEC.build()
    state = {prefix + k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if wrapper is None else {wrapper: state, "best": 0.5}, path)
    target = SPEC.build()
    load_state(target, read_state(path), str(path))
    assert torch.equal(target.layer3[0].conv2.weight, source.layer3[0].conv2.weight)


def test_mismatch_lists_everything():
    state = SPEC.build().state_dict()
    state["extra"] = state.pop("conv1.weight")
    state["linear.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError) as caught:
        load_state(SPEC.build(), state, "w.pt")
    message = str(caught.value)
    assert "missing: conv1.weight" in message
    assert "unexpected: extra" in message
    assert "linear.bias (3,) instead of (10,)" in message


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("wrapping", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(wrapping, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    if wrapping == "torch":
        torch.save({"a": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(WeightsError, match=r"w\.pt"):
        read_state(path)
    assert not (tmp_path / "evil").exists()


def test_a_failed_load_leaves_the_network_as_it_was(tmp_path):
    tspc.save(tspc.compress(SPEC.build(), "tt", 0.3, allocation="uniform"), tmp_path / "a.safetensors")
    other = NetworkSpec("builtin", "resnet8", 7).build()
    with pytest.raises(WeightsError, match=r"linear.weight .* instead of"):
        tspc.load(tmp_path / "a.safetensors", other)
    assert type(other.layer1[0].conv1) is nn.Conv2d


def test_compressed_weights_are_no_pretrained_ones(tmp_path):
    tspc.save(tspc.compress(SPEC.build(), "tt", 0.3, allocation="uniform"), tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match="is a network that tspc has compressed"):
        read_state(tmp_path / "small.safetensors")
    tspc.save(SPEC.build(), tmp_path / "dense.safetensors")
    assert "conv1.weight" in read_state(tmp_path / "dense.safetensors")


def test_files_are_as_readable_as_any_other(tmp_path):
    tspc.save(SPEC.build(), tmp_path / "a.safetensors")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_other_dtypes_come_back(tmp_path):
    small = tspc.compress(SPEC.build().double(), "cp", 0.3, allocation="uniform")
    tspc.save(small, tmp_path / "a.safetensors", network=SPEC)
    loaded = tspc.load(tmp_path / "a.safetensors")
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.conv1.weight.dtype == torch.float64


def test_legacy_files_cut_anywhere(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(50.0)}, whole, _use_new_zipfile_serialization=False)
    content = whole.read_bytes()
    for end in range(0, len(content) - 1, 7):
        (tmp_path / "cut.pt").write_bytes(content[:end])
        with pytest.raises(WeightsError):
            read_state(tmp_path / "cut.pt")


@pytest.mark.parametrize("content", [b"hello", b"apple", b"", b"PK\x03\x04broken", b"not a checkpoint at all"])
def test_truncated_pickles(content, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="truncated or is no PyTorch checkpoint"):
        read_state(path)


def test_other_files(tmp_path):
    (tmp_path / "w.onnx").write_text("")
    with pytest.raises(WeightsError, match="expected a file ending in"):
        read_state(tmp_path / "w.onnx")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_state(tmp_path / "w.pt")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write .*a\.txt: No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_a_directory_cannot_be_opened_files_are_written_all_the_same(tmp_path, monkeypatch):
    opened = os.open

    def as_on_windows(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", as_on_windows)
    write_atomically(tmp_path / "a.txt", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "a.txt").read_text() == "new"
