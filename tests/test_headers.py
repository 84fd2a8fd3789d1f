"""Headers that are damaged or lie: WeightsError in one line, and a network that is as it was."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch

import tspc
from tspc.compression.checkpoint import read_header
from tspc.errors import TspcError, WeightsError
from tspc.models import NetworkSpec
from tspc.models.weights import read_state

SPEC = NetworkSpec("builtin", "resnet8", 10, 1, 8)
LAYER = "layer1.0.conv1"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A compressed network's file and a dense one's, as bytes."""
    folder = tmp_path_factory.mktemp("files")
    tspc.save(tspc.compress(SPEC.build(), "tt", 0.3, allocation="uniform"), folder / "small", network=SPEC)
    tspc.save(SPEC.build(), folder / "dense", network=SPEC)
    torch.save(SPEC.build().state_dict(), folder / "pickle")
    return {name: (folder / name).read_bytes() for name in ("small", "dense", "pickle")}


def with_header(content: bytes, change, checksums: bool = False) -> bytes:
    """The file with what `change` makes of tspc's header (text, or None for what it did in place)."""
    size = struct.unpack("<Q", content[:8])[0]
    whole = json.loads(content[8 : 8 + size])
    header = json.loads(whole["__metadata__"]["tspc"])
    changed = change(header)
    whole["__metadata__"]["tspc"] = changed if isinstance(changed, str) else json.dumps(header)
    if not checksums:
        del whole["__metadata__"]["checksums"]
    text = json.dumps(whole).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


CHANGES = {
    "not JSON": lambda h: "{",
    "deep": lambda h: "[" * 100_000,
    "a list": lambda h: "[]",
    "null": lambda h: "null",
    "format a string": lambda h: h.update(format="1"),
    "format true": lambda h: h.update(format=True),
    "format of a later version": lambda h: h.update(format=10**9),
    "no layers": lambda h: h.pop("layers") and None,
    "no info": lambda h: h.pop("info") and None,
    "layers a list": lambda h: h.update(layers=[1]),
    "network a number": lambda h: h.update(network=5),
    "network with more keys": lambda h: h["network"].update(x=1),
    "network without a name": lambda h: h["network"].pop("name") and None,
    "family a list": lambda h: h["network"].update(family=[]),
    "kwargs a list": lambda h: h["network"].update(kwargs=[]),
    "classes huge": lambda h: h["network"].update(num_classes=10**14),
    "classes negative": lambda h: h["network"].update(num_classes=-1),
    "classes true": lambda h: h["network"].update(num_classes=True),
    "channels a fraction": lambda h: h["network"].update(in_channels=1.5),
    "layer a string": lambda h: h["layers"].update({LAYER: "x"}),
    "layer without a name": lambda h: h["layers"].update({"": h["layers"][LAYER]}),
    "layer that is not there": lambda h: h["layers"].update({"x\ud800\n": h["layers"].pop(LAYER)}),
    "layer in a layer": lambda h: h["layers"].update({f"{LAYER}.0": h["layers"][LAYER]}),
    "shape empty": lambda h: h["layers"][LAYER].update(shape=[]),
    "shape huge": lambda h: h["layers"][LAYER].update(shape=[10**12, 10**12]),
    "shape of text": lambda h: h["layers"][LAYER].update(shape="ab"),
    "rank 0": lambda h: h["layers"][LAYER].update(rank=[0, 0, 0]),
    "rank of strings": lambda h: h["layers"][LAYER].update(rank=["a", "b", "c"]),
    "rank short": lambda h: h["layers"][LAYER].update(rank=[2]),
    "rank missing": lambda h: h["layers"][LAYER].pop("rank") and None,
    "rank huge": lambda h: h["layers"][LAYER].update(rank=[10**12] * 3),
    "rank another": lambda h: h["layers"][LAYER].update(rank=[1, 1, 1]),
    "method unknown": lambda h: h["layers"][LAYER].update(method={"name": "evil"}),
    "method a list": lambda h: h["layers"][LAYER].update(method={"name": [1]}),
    "method auto": lambda h: h["layers"][LAYER].update(method={"name": "auto"}),
    "method another": lambda h: h["layers"][LAYER].update(method={"name": "cp"}, rank=[4]),
    "method with more settings": lambda h: h["layers"][LAYER].update(method={"name": "tt", "x": 1}),
    "method of wrong settings": lambda h: h["layers"][LAYER].update(method={"name": "cp", "tolerance": "x"}),
    "order huge": lambda h: h["layers"][LAYER].update(method={"name": "rtt", "order": 10**6}),
    "path unknown": lambda h: h["layers"][LAYER].update(path="../../x"),
    "path a list": lambda h: h["layers"][LAYER].update(path=[1]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_header_is_one_line(name, files, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(with_header(files["small"], CHANGES[name]))
    for model in (None, SPEC.build()):
        try:
            tspc.load(path, model)
        except WeightsError as error:
            text = str(error)
            assert "bad.safetensors" in text
            assert "\n" not in text
            assert text.isprintable()
            assert len(text) < 600
        else:
            assert model is not None, "what the file tells of the network does not matter where one is given"
            assert "network" in name or any(word in name for word in ("family", "kwargs", "classes", "channels"))


def test_what_was_changed_after_it_was_written_is_noticed(files, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(files["small"], lambda h: h["info"].update(accuracy=1), checksums=True))
    for reads in (tspc.load, read_header):
        with pytest.raises(WeightsError, match="not what was written, by its checksum"):
            reads(path)
    content = bytearray(files["dense"])
    content[-3] ^= 64
    path.write_bytes(content)
    for reads in (tspc.load, read_state):
        with pytest.raises(WeightsError, match="not what was written, by its checksum"):
            reads(path)


def test_files_without_checksums_load(files, tmp_path):
    path = tmp_path / "old.safetensors"
    path.write_bytes(
        with_header(files["small"], lambda h: [layer.pop("path") for layer in h["layers"].values()] and None)
    )
    (tmp_path / "new.safetensors").write_bytes(files["small"])
    old, new = tspc.load(path).state_dict(), tspc.load(tmp_path / "new.safetensors").state_dict()
    assert all(torch.equal(value, new[name]) for name, value in old.items())


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The file with bits or bytes changed (mostly in the header), or cut, or with a piece moved."""
    content = bytearray(content)
    size = min(struct.unpack("<Q", content[:8])[0] + 8, len(content))
    kind = draw.choice(["bit", "bit", "byte", "bytes", "cut", "grown", "piece"])
    for _ in range({"bytes": 20}.get(kind, 1)):
        place = draw.randrange(size if draw.random() < 0.7 else len(content))
        if kind == "bit":
            content[place] ^= 1 << draw.randrange(8)
        elif kind in ("byte", "bytes"):
            content[place] = draw.randrange(256)
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "grown":
        content += bytes(draw.randrange(1, 100))
    elif kind == "piece":
        start, end = sorted((draw.randrange(len(content)), draw.randrange(len(content))))
        content[start:end] = content[end : end + draw.randrange(50)]
    return bytes(content)


VALUES = [None, True, -1, 0, 1, 2.5, 1e308, 10**14, 10**30, "", "x", "tt", [], [1], [0, 0], {}, {"name": "tt"}, [[[]]]]


def mutated(header: dict, draw: random.Random) -> None:
    """Changes, removes, or adds something anywhere in the header."""
    node: object = header
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))  # type: ignore[arg-type]
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.75:  # type: ignore[index]
            node = node[key]  # type: ignore[index]
            continue
        kind = draw.choice(["value", "value", "gone", "new"])
        if kind == "value":
            node[key] = draw.choice(VALUES)  # type: ignore[index]
        elif kind == "gone":
            del node[key]  # type: ignore[attr-defined]
        elif isinstance(node, dict):
            node[draw.choice(["x", "name", "order", "path"])] = draw.choice(VALUES)
        return


def same(state, expected) -> bool:
    return set(state) == set(expected) and all(torch.equal(state[name], value) for name, value in expected.items())


def try_damage(files, path, draw: random.Random) -> str:
    """Reads one damaged file in each way; "refused" or "same", AssertionError for anything else."""
    name = draw.choice(["small", "dense", "changed", "pickle"])
    if name == "changed":
        content = with_header(files["small"], lambda header: mutated(header, draw))
    else:
        content = damaged(files[name], draw)
    path = path.with_suffix(".pt" if name == "pickle" else ".safetensors")
    path.write_bytes(content)
    ways = (
        [read_state] if name == "pickle" else [tspc.load, lambda p: tspc.load(p, SPEC.build()), read_header, read_state]
    )
    outcome = "refused"
    for reads in ways:
        try:
            found = reads(path)
        except TspcError:
            continue
        outcome = "same"
        if name == "pickle":
            continue  # that format has no checksums that anybody reads
        if reads is not read_header:
            original = files["states"]["dense" if name == "dense" else "small"]
            state = found if isinstance(found, dict) else found.state_dict()
            assert same(state, original), "other weights, without a word"
    return outcome


def test_damaged_files_are_refused_or_the_same(files, tmp_path):
    for name in ("small", "dense"):
        (tmp_path / name).write_bytes(files[name])
    states = {name: tspc.load(tmp_path / name).state_dict() for name in ("small", "dense")}
    draw = random.Random(0)
    outcomes = [try_damage(files | {"states": states}, tmp_path / "bad", draw) for _ in range(60)]
    assert outcomes.count("refused") > 30
