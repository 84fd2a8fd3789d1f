"""A file that describes its network: harmless descriptions are built, others make nobody load or run anything."""

from __future__ import annotations

import json
import os
import pickle
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tspc
from tspc.errors import WeightsError
from tspc.models import NetworkSpec

SPEC = NetworkSpec("builtin", "resnet8", 10, 1, 8)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def rewritten(path, **network):
    """The same file with another description of its network, as a stranger could write it: without checksums."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tspc"])
    header["network"] |= network
    save_file(load_file(path), path, {"tspc": json.dumps(header)})
    return path


@pytest.fixture
def described(tmp_path, monkeypatch):
    """A function that loads a file with a description, where whatever loads anything from elsewhere is noticed."""
    from transformers import AutoConfig

    monkeypatch.chdir(tmp_path)
    touched = []

    def noticed(name):
        def fail(*arguments, **settings):
            touched.append(name)
            raise OSError(f"{name} was called")

        return fail

    monkeypatch.setattr(socket.socket, "connect", noticed("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", noticed("getaddrinfo"))
    monkeypatch.setattr(torch, "load", noticed("torch.load"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", noticed("hub"))
    monkeypatch.setattr(AutoConfig, "from_pretrained", noticed("AutoConfig.from_pretrained"))
    for name in ("evil.pth", "evil.bin"):
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Evil()}))
    path = tmp_path / "small.safetensors"
    tspc.save(SPEC.build(), path, network=SPEC)

    def load(**network):
        try:
            return tspc.load(rewritten(path, **network))
        finally:
            assert not touched
            assert not (tmp_path / "evil").exists()

    return load


@pytest.mark.parametrize(
    "kwargs",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained_cfg": "a1_in1k"},
        {"pretrained_cfg_overlay": {"file": "evil.pth", "url": ""}},
        {"cache_dir": "cache"},
        {"norm_layer": "os.system"},
        {"act_layer": ["relu", "evil"]},
        {"drop_rate": 10**30},
        {"block_args": {"a": 1}},
        {"hybrid_backbone": 1},
    ],
)
def test_arguments_of_timm_are_taken_from_a_list(kwargs, described):
    with pytest.raises(WeightsError, match=f"{next(iter(kwargs))} .* not taken from a file"):
        described(family="timm", name="resnet18", kwargs=kwargs)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:evil", "../resnet18", "resnet18.no_such"])
def test_a_file_names_networks_of_timm_itself_alone(name, described):
    with pytest.raises(WeightsError):
        described(family="timm", name=name)


@pytest.mark.parametrize(
    "kwargs",
    [{"weights": "DEFAULT"}, {"weights": 1}, {"pretrained": True}, {"norm_layer": "x"}, {"weights_backbone": 1}],
)
def test_arguments_of_torchvision_are_taken_from_a_list(kwargs, described):
    with pytest.raises(WeightsError, match=f"{next(iter(kwargs))} .* not taken from a file"):
        described(family="torchvision", name="resnet18", in_channels=3, kwargs=kwargs)


def test_networks_built_in_take_no_arguments_from_a_file(described):
    with pytest.raises(WeightsError, match="not taken from a file"):
        described(kwargs={"x": 1})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"_attn_implementation": "owner/kernels"},
        {"attn_implementation": "owner/kernels"},
        {"auto_map": {"AutoModel": "evil--model.Evil"}},
        {"_name_or_path": "owner/name"},
        {"trust_remote_code": True},
        {"quantization_config": {"quant_method": "evil"}},
        {"hidden_act": "os.system"},
        {"dtype": "float16"},
        {"return_dict": False},
        {"use_pretrained_backbone": True},
        {"backbone": "owner/name"},
    ],
)
def test_fields_of_transformers_are_taken_from_the_types_own(kwargs, described):
    with pytest.raises(WeightsError, match=f"{next(iter(kwargs))} .* not taken from a file"):
        described(family="transformers", name="vit", image_size=16, kwargs=kwargs)


@pytest.mark.parametrize("name", ["owner/name", "folder", "./folder", "timm_wrapper", "jamba", "no_such_type"])
def test_a_file_names_no_folder_and_no_repository(name, described, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "vit", "auto_map": {"AutoConfig": "evil.Evil"}}')
    with pytest.raises(WeightsError):
        described(family="transformers", name=name)


def test_a_folder_called_like_a_type_is_not_read(described, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    (tmp_path / "vit").mkdir()
    with pytest.raises(WeightsError, match="does not fit the network"):
        described(family="transformers", name="vit", image_size=16, kwargs=sizes)


@pytest.mark.parametrize(
    "network",
    [
        {"num_classes": 10**14},
        {"num_classes": 10**7},
        {"num_classes": -1},
        {"in_channels": 10**9},
        {"family": "timm", "name": "resnet18", "kwargs": {"width_factor": 1, "channels": [10**6] * 4}},
        {"family": "timm", "name": "vit_tiny_patch16_224", "kwargs": {"depth": 10**7}},
        {"family": "transformers", "name": "bert", "kwargs": {"num_hidden_layers": 10**7}},
        {"family": "transformers", "name": "bert", "kwargs": {"hidden_size": 12 * 10**5}},
    ],
)
def test_networks_far_larger_than_the_file_are_not_built(network, described):
    with pytest.raises(WeightsError, match="small.safetensors"):
        described(**network)


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec("timm", "resnet10t", 4, kwargs={"drop_rate": 0.1, "act_layer": "silu", "channels": [8, 8, 16, 16]}),
        NetworkSpec("torchvision", "shufflenet_v2_x0_5", 4),
        NetworkSpec("torchvision", "regnet_y_400mf", 4),
        NetworkSpec(
            "transformers",
            "vit",
            4,
            image_size=16,
            kwargs={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "hidden_act": "relu",
            },
        ),
    ],
    ids=lambda spec: spec.name,
)
def test_harmless_descriptions_give_the_same_network(spec, tmp_path):
    small = tspc.compress(spec.build(), "svd", 0.5, allocation="uniform").eval()
    tspc.save(small, tmp_path / "a.safetensors", network=spec)
    loaded = tspc.load(tmp_path / "a.safetensors").eval()
    assert not any(value.is_meta for value in loaded.state_dict().values())
    x = torch.randn(1, 3, *[spec.image_size or 64] * 2)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
