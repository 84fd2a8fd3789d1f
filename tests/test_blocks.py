"""Blocks of any network are found by what repeats in it; those of image classifiers stay what they were."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tspc.layers.dense import has_inputs
from tspc.models import NetworkSpec
from tspc.traversal.blocks import find_blocks

RECORDED = json.loads((Path(__file__).parent / "earlier" / "blocks.json").read_text())
"""For each network the number of its blocks, and a hash of their names, when blocks were found by layer types."""
SOME = [
    *("builtin/lenet5", "builtin/resnet32", "torchvision/resnet18", "torchvision/densenet121", "torchvision/vit_b_16"),
    *("torchvision/mobilenet_v2", "torchvision/efficientnet_b0", "torchvision/swin_v2_t", "torchvision/googlenet"),
    *("torchvision/maxvit_t", "torchvision/shufflenet_v2_x0_5", "torchvision/regnet_y_400mf", "torchvision/mnasnet0_5"),
]


def blocks_of(model: nn.Module) -> list[str]:
    return find_blocks(model, [name for name, module in model.named_modules() if has_inputs(module)])


@pytest.mark.parametrize("full", SOME)
def test_image_classifiers_keep_their_blocks(full):
    check(full)


@pytest.mark.slow
def test_all_image_classifiers_keep_their_blocks():
    known = {name.removeprefix("torchvision/") for name in RECORDED}
    assert known >= set(torchvision.models.list_models(module=torchvision.models))
    for full in set(RECORDED) - set(SOME):
        if "regnet" not in full:  # which are not built without memory
            check(full)


def check(full: str) -> None:
    family, name = full.split("/")
    with (
        torch.device("cpu" if "regnet" in name else "meta"),
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of the initial weights
        for kind in ("uniform", "normal", "trunc_normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform"):
            patch.setattr(nn.init, f"{kind}_", lambda tensor, *given, **named: tensor)  # numbers make no blocks
        if family == "torchvision":  # with the parts that are for training alone
            model = torchvision.models.get_model(name, weights=None)
        else:
            model = NetworkSpec(family, name, 10).build()
    found = blocks_of(model)
    assert [len(found), hashlib.sha256(" ".join(found).encode()).hexdigest()[:12]] == RECORDED[full], found


class Dense(nn.Module):
    """A layer of somebody's own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.T


class Own(nn.Module):
    """A block with one layer of a known kind and one of somebody's own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mix, self.out = Dense(width, width), nn.Linear(width, width)


class Other(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Conv1dBlock(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(width // stride, width, 3), nn.Conv1d(width, width, 3)


class Layer(nn.Module):
    """A convolution with its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)


class Head(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Decoder(nn.Module):
    """A transformer block whose heads, or whose experts, stand side by side in a list."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        parts = [Head(8, 4) if heads else Expert(8) for _ in range(2)]
        self.parts, self.out = nn.ModuleList(parts), nn.Linear(8, 8)
        if not heads:
            self.router = nn.Linear(8, 2)


class Inside(nn.Module):
    """The network as the only part of another one, so that it is found by repetition alone."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.net = nn.Module()
        for name, part in parts.items():
            self.net.add_module(name, part)


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.blocks = nn.Conv1d(width // 2, width, 2), nn.ModuleList(Conv1dBlock(width) for _ in range(2))


NETWORKS = {
    "own layers": (Inside(layers=nn.ModuleList(Own() for _ in range(3))), [f"net.layers.{i}" for i in range(3)]),
    "mixed": (
        Inside(layers=nn.ModuleList([Own(), Other(), Own(), Other()]), head=nn.Linear(8, 2)),
        [*(f"net.layers.{i}" for i in range(4)), "net.head"],
    ),
    "attributes": (
        Inside(stem=nn.Conv1d(1, 8, 3), **{f"block{i + 1}": Conv1dBlock(8 * 2**i, 2 if i else 1) for i in range(3)}),
        ["net.stem", "net.block1", "net.block2", "net.block3"],
    ),
    "two attributes are a block": (Inside(attention1=Other(), attention2=Other(), out=nn.Linear(8, 8)), ["net"]),
    "dict": (Inside(layers=nn.ModuleDict({"a": Own(), "b": Own()})), ["net.layers.a", "net.layers.b"]),
    "sequence with pooling": (
        Inside(body=nn.Sequential(nn.Conv1d(1, 8, 3), Conv1dBlock(8), nn.MaxPool1d(2), Conv1dBlock(16, 2))),
        ["net.body.0", "net.body.1", "net.body.3"],
    ),
    "single layers": (Inside(layers=nn.ModuleList(Layer() for _ in range(6))), [f"net.layers.{i}" for i in range(6)]),
    "heads": (Inside(layers=nn.ModuleList(Decoder(True) for _ in range(2))), ["net.layers.0", "net.layers.1"]),
    "experts": (Inside(layers=nn.ModuleList(Decoder(False) for _ in range(2))), ["net.layers.0", "net.layers.1"]),
    "stages": (
        Inside(stages=nn.ModuleList(Stage(8 * 2**i) for i in range(2))),
        [f"net.stages.{i}.{part}" for i in range(2) for part in ("down", "blocks.0", "blocks.1")],
    ),
    "encoder of PyTorch": (
        Inside(encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)),
        [f"net.encoder.layers.{i}" for i in range(3)],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_found_by_repetition(name):
    model, blocks = NETWORKS[name]
    assert blocks_of(model) == blocks


def test_classes_made_on_the_fly_repeat_by_their_structure():
    made = [type(f"Block{i}", (Other,), {})() for i in range(3)]
    assert blocks_of(Inside(layers=nn.ModuleList(made))) == [f"net.layers.{i}" for i in range(3)]


def transformer(kind: str, **fields: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **fields))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "blocks"),
    [
        ("gpt2", {}, [f"h.{i}" for i in range(12)]),
        (
            "whisper",
            {},
            ["encoder.conv1", "encoder.conv2"]
            + [f"{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(4)],
        ),
        ("clip_vision_model", {}, ["embeddings", *(f"encoder.layers.{i}" for i in range(12))]),
        # Its layers are of two classes.
        ("jamba", {"num_hidden_layers": 8, "num_experts": 2, "vocab_size": 50}, [f"layers.{i}" for i in range(8)]),
    ],
)
def test_networks_of_transformers_as_parts_of_others(kind, fields, blocks):
    assert blocks_of(Inside(own=transformer(kind, **fields))) == [f"net.own.{name}" for name in blocks]
