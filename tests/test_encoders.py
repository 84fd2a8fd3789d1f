"""Encoders, and networks from elsewhere: their dense layers compressed, run, saved, loaded, exported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tspc
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.compress import compress
from tspc.data.answers import answered
from tspc.data.arranging import inputs_of
from tspc.deploy import export
from tspc.errors import ConfigError, TspcError, WeightsError
from tspc.layers.forms import tensorized_layers
from tspc.layers.replacing import set_module
from tspc.models import NetworkSpec

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TIMM_SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
ENCODERS = {
    "bert": (NetworkSpec("transformers", "bert", 4, kwargs=SMALL | {"vocab_size": 50}), torch.randint(0, 50, (3, 7))),
    "vit": (
        NetworkSpec("transformers", "vit", 4, 3, 32, kwargs=SMALL | {"patch_size": 16}),
        torch.randn(3, 3, 32, 32),
    ),
    "timm": (NetworkSpec("timm", "vit_tiny_patch16_224", 4, 3, 32, kwargs=TIMM_SMALL), torch.randn(3, 3, 32, 32)),
}


def built(spec: NetworkSpec) -> nn.Module:
    torch.manual_seed(0)
    return spec.build().eval()


@pytest.mark.parametrize("method", ["svd", "rtt"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_its_rebuilt_kernels_and_survives_its_files(name, method, tmp_path):
    spec, inputs = ENCODERS[name]
    model = built(spec)
    small = compress(model, method, 0.5, allocation="uniform").eval()
    layers = tensorized_layers(small)
    # Query, key and value apart or in one, the projection, two of the perceptron, in both blocks.
    assert len(layers) >= 2 * (4 if name == "timm" else 6)
    rebuilt = copy.deepcopy(model)
    with torch.no_grad():
        for layer, module in layers.items():
            dense = copy.deepcopy(model.get_submodule(layer))
            dense.weight.copy_(module.weight)
            set_module(rebuilt, layer, dense)
        torch.testing.assert_close(small(inputs), rebuilt(inputs), rtol=1e-4, atol=1e-5)
        assert small(inputs).shape == (3, 4)
        tspc.save(small, tmp_path / "small.safetensors", network=spec)
        loaded = tspc.load(tmp_path / "small.safetensors").eval()
        assert torch.equal(loaded(inputs), small(inputs))
    # One of each kind: tracing takes seconds.
    for format in {"bert-rtk": ["onnx"], "timm-rtt": ["onnx"], "vit-svd": ["pt2"]}.get(f"{name}-{method}", []):
        assert export(small, tmp_path / f"small.{format}", inputs).relative < 1e-5


def test_transformers_read_a_folder_and_run_nothing_in_it(tmp_path):
    spec, inputs = ENCODERS["bert"]
    model = built(spec)
    model.network.save_pretrained(tmp_path / "bert")
    there = NetworkSpec("transformers", str(tmp_path / "bert"), 4)
    torch.testing.assert_close(there.build(pretrained=True).eval()(inputs), model(inputs))
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="pretrained=default: "):
        there.build(pretrained=True)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("timm", "resnetv2_5", "'resnetv2_5' is not a network of timm; did you mean resnetv2_50"),
        ("transformers", "brt", "'brt' is no model type of transformers, .* did you mean bert"),
    ],
)
def test_unknown_networks(family, name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **kwargs: asked.append(args))
    with pytest.raises(ConfigError, match=message):
        NetworkSpec(family, name, 10, 3, 32).build()
    assert asked == [], "the hub is not asked for what it cannot have"


def test_wrong_arguments_are_told():
    with pytest.raises(ConfigError, match="does not fit timm's resnetv2_50"):
        NetworkSpec("timm", "resnetv2_50", 10, kwargs={"colour": 1}).build()
    with pytest.raises(ConfigError, match="bert is a type of network; name a folder"):
        NetworkSpec("transformers", "bert", 10).build(pretrained=True)
    with pytest.raises(TspcError):
        NetworkSpec("transformers", "bert", 10, kwargs={"hidden_size": 30, "num_attention_heads": 4}).build()


def test_the_preactivation_resnet_of_timm():
    model = built(NetworkSpec("timm", "resnetv2_50", 5, 3, 64, kwargs={"layers": (1, 1, 1, 1), "width_factor": 1}))
    small = compress(model, "tk", 0.3, allocation="uniform").eval()
    assert len(tensorized_layers(small)) > 10
    with torch.no_grad():
        assert small(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_images_beside_texts_are_judged_by_their_match():
    """The layers of both encoders of CLIP count, for the answer of both tells how well images and texts match."""
    import transformers

    from tests.tiny_transformers import PICTURES, TOKENS

    torch.manual_seed(0)
    parts = {"vision_config": PICTURES, "text_config": SMALL | TOKENS | {"max_position_embeddings": 16}}
    model = transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=16)).eval()
    ids = torch.randint(3, 50, (24, 7))
    ids[:, -1] = TOKENS["eos_token_id"]
    batch = {"input_ids": ids, "pixel_values": torch.randn(24, 3, 32, 32), "attention_mask": torch.ones_like(ids)}
    given = inputs_of(model, batch)
    with torch.no_grad():
        assert torch.equal(answered(model, given), model(**batch).logits_per_image)
    names = [name for name, _ in model.named_modules() if name.endswith("mlp.fc1")]
    with Samples(given, Calibration(samples=24, batch_size=8)) as samples:
        survey = samples.survey(model, names, names)
        weights = [survey.weights(name) for name in names]
    assert len(weights) == 4
    assert all(found is not None and float(found.abs().sum()) > 0 for found in weights)
    small = compress(model, "svd", 0.5, calibration=batch)
    assert {name.partition(".")[0] for name in tensorized_layers(small)} == {"text_model", "vision_model"}
