"""The networks: sizes, names, blocks, and public weights that load unchanged."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from tests.methods import FAMILIES
from tspc.compression.compress import compress
from tspc.compression.planning import plan
from tspc.errors import ConfigError
from tspc.models import BUILTIN, NetworkSpec
from tspc.models.weights import load_state, read_state
from tspc.traversal.blocks import block_of, find_blocks


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_builtin_networks_run(name, channels, size):
    model = NetworkSpec("builtin", name, 7, channels, size).build()
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # He et al. give 0.27, 0.46, 0.66 and 0.85 million for depths 20, 32, 44 and 56; LeNet-5's is the sum of its layers.
    [("resnet20", 269722), ("resnet32", 464154), ("resnet44", 658586), ("resnet56", 853018), ("resnet32_v2", 466970)],
)
def test_parameter_counts(name, parameters):
    assert sum(p.numel() for p in NetworkSpec("builtin", name, 10).build().parameters()) == parameters


def test_public_weights_load_unchanged(shared):
    model = NetworkSpec("builtin", "resnet32", 10).build()
    state = read_state(shared / "weights" / "resnet32-d509ac18.th")
    load_state(model, state, "public weights")
    assert torch.equal(model.state_dict()["layer3.4.conv2.weight"], state["layer3.4.conv2.weight"])


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("builtin", "resnet33", "did you mean resnet32"),
        ("torchvision", "resnet51", "did you mean resnet50"),
        ("custom", "x", "expected package.module:function"),
    ],
)
def test_unknown_networks(family, name, message):
    with pytest.raises(ConfigError, match=message):
        NetworkSpec(family, name, 10).build()


def test_unsuitable_data():
    with pytest.raises(ConfigError, match="takes images of 3 channels"):
        NetworkSpec("torchvision", "resnet18", 10, in_channels=1).build()
    with pytest.raises(ConfigError, match="at least 12×12"):
        NetworkSpec("builtin", "lenet5", 10, 1, 8).build()
    with pytest.raises(ConfigError, match="1000 classes, the data set has 10"):
        NetworkSpec("torchvision", "resnet18", 10).build(pretrained=True)
    with pytest.raises(ConfigError, match="has no published weights"):
        NetworkSpec("builtin", "resnet20", 10).build(pretrained=True)
    with pytest.raises(ConfigError, match="num_classes is needed"):
        NetworkSpec("builtin", "resnet20").build()


def test_custom_factory(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def build(width=8): return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3))\n"
        "def broken(): raise ValueError('no')\n"
        "def number(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = NetworkSpec("custom", "mynet", factory="mynet:build", kwargs={"width": 16}).build()
    assert model[1].in_channels == 16
    (tmp_path / "wrongnet.py").write_text("def build(:\n")
    for factory, message in [
        ("wrongnet:build", "cannot be imported"),
        ("mynet:missing", "cannot be imported"),
        ("nothere:build", "PYTHONPATH"),
        ("mynet:broken", "failed: ValueError: no"),
        ("mynet:number", "returned int"),
    ]:
        with pytest.raises(ConfigError, match=message):
            NetworkSpec("custom", "x", factory=factory).build()
    sys.modules.pop("mynet")


TORCHVISION = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "googlenet"]
TORCHVISION.append(pytest.param("swin_v2_t", marks=pytest.mark.slow))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_compress_and_run(name):
    torch.manual_seed(0)
    model = NetworkSpec("torchvision", name, 10).build().eval()
    small = compress(model, "tt", 0.3, allocation="uniform")
    x = torch.randn(1, 3, 96, 96)
    assert small(x).shape == model(x).shape


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("resnet50", 16, "layer1.0"),
        ("vit_b_16", 12, "encoder.layers.encoder_layer_0"),
        ("densenet121", 7, "features.denseblock1"),
        ("regnet_y_400mf", 16, "trunk_output.block1"),
        ("inception_v3", 15, "Conv2d_2a_3x3"),
    ],
)
def test_blocks_of_torchvision_networks(name, count, first):
    model = NetworkSpec("torchvision", name, 10).build()
    made = plan(model, "svd", 0.3, allocation="uniform")
    layers = [layer.name for layer in made.tensorized]
    blocks = find_blocks(model, layers)
    assert (len(blocks), blocks[0]) == (count, first)
    assert all(block_of(layer, blocks) is not None for layer in layers)


@pytest.mark.parametrize("name", ["vit_b_16", "googlenet", "regnet_y_400mf"])
def test_distillation_blocks_do_not_depend_on_the_method(name):
    """Blocks are those of the dense network: a chain is several convolutions, a rebuilt layer none."""
    model = NetworkSpec("torchvision", name, 10).build()
    found = set()
    for method in ("tt", "rtt"):
        layers = [layer.name for layer in plan(model, method, 0.1, allocation="uniform").tensorized]
        found.add(tuple(find_blocks(model, layers)))
    assert len(found) == 1


def test_blocks_by_pattern():
    model = NetworkSpec("builtin", "resnet20", 10).build()
    layers = [layer.name for layer in plan(model, "svd", 0.3, allocation="uniform").tensorized]
    assert find_blocks(model, layers, "layer?") == ["layer1", "layer2", "layer3"]
    assert len(find_blocks(model, layers, "layer?.*")) == 9
    assert len(find_blocks(model, layers)) == 9
    with pytest.raises(ConfigError, match="matches no module"):
        find_blocks(model, layers, "stage*")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_resnet50_runs_as_its_rebuilt_kernels(name):
    """The network equals the one with dense kernels rebuilt from the factors."""
    from tspc.layers.forms import tensorized_layers
    from tspc.layers.replacing import set_module

    torch.manual_seed(0)
    # All of its layers, of a quarter of the width inside of the blocks.
    model = NetworkSpec("torchvision", "resnet50", 1000, kwargs={"width_per_group": 16}).build().eval()
    small = compress(model, name, 0.1, allocation="uniform")
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        small, model = small.to(dtype), model.to(dtype)
        for layer_name, layer in tensorized_layers(small).items():
            dense = model.get_submodule(layer_name)
            assert isinstance(dense, nn.Conv2d)
            dense.weight = nn.Parameter(layer.weight.detach())
            set_module(model, layer_name, dense)
        x = torch.randn(2, 3, 64, 64, dtype=dtype)
        with torch.no_grad():
            expected, found = model(x), small(x)
        assert float((found - expected).norm() / expected.norm()) < tolerance
