"""What is kept of the values that the blocks of a network hand each other, in memory and in files."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from tspc.errors import RunError
from tspc.traversal.nested import UnknownValueError, mapped, tensors_in
from tspc.traversal.stash import Room, Stash


class Pair(NamedTuple):
    x: Any
    mask: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Any
    note: str = "kept"
    made: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.made.append(1)


@dataclass(slots=True)
class Slots:
    x: Any


class Cache:
    """Grows with every call."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []


def values() -> dict[str, Any]:
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    x = torch.arange(6.0).view(2, 3)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    grown = Cache()
    grown.seen.append(x)
    found = {
        "namedtuple": Pair(x, None),
        "dataclass": Frozen(x),
        "slots": Slots([x, None]),
        "ordered": OrderedDict(a=x, b={"c": (x, 3)}),
        "output": BaseModelOutput(last_hidden_state=x, hidden_states=(x, x + 1)),
        "cache": cache,
        "object": grown,
        "structure": torch.max(x, 1),
        "none": None,
    }
    return found | {"nested": (found["namedtuple"], [found["output"]], {"k": found["dataclass"]})}


@pytest.mark.parametrize("memory", [0, 100])
def test_values_of_every_kind_come_back_as_they_were(memory):
    room = Room(memory)
    stash, given = Stash(room), values()
    for value in given.values():
        stash.append(value)
    for (name, value), back in zip(given.items(), stash, strict=True):
        assert type(back) is type(value), name
        for before, after in zip(tensors_in(value), tensors_in(back), strict=True):
            assert torch.equal(before, after)
    back = dict(zip(given, stash, strict=True))
    assert back["namedtuple"]._fields == ("x", "mask")
    assert (back["dataclass"].note, back["dataclass"].made) == ("kept", [1]), "without a second call of the constructor"
    assert back["output"].hidden_states[0] is back["output"].last_hidden_state, "what was one tensor is one tensor"
    assert back["output"].to_tuple()[0] is back["output"]["last_hidden_state"]
    assert list(back["ordered"]) == ["a", "b"]
    assert torch.equal(back["structure"].indices, torch.tensor([2, 2]))
    caches = back["cache"].self_attention_cache, given["cache"].self_attention_cache
    caches[0].update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
    assert [cache.get_seq_length() for cache in caches] == [4, 3], "a copy"
    room.close()


def test_files_hold_tensors_alone_and_nothing_that_they_are_views_of(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    room = Room(0)
    stash, whole = Stash(room), torch.randn(100, 1000)
    stash.append(Pair(whole[:1], Cache()))
    (file,) = tmp_path.rglob("*.pt")
    assert file.stat().st_size < 20_000
    (found,) = torch.load(file, weights_only=True)
    assert torch.equal(found, whole[:1])
    room.close()
    room = Room(1)
    stash = Stash(room)
    stash.append(whole[:1])
    assert stash[0].untyped_storage().nbytes() == 4000, "in memory neither"
    room.close()


@pytest.mark.parametrize("memory", [0, 100])
def test_what_float16_cannot_hold_is_kept_as_it_is(memory):
    room = Room(memory)
    stash = Stash(room, half=True)
    usual = torch.randn(1000) * 30
    exact = [
        torch.tensor([7e4, 1.0, -3.14159]),
        torch.tensor([1e-7, 3.3e-6]),
        torch.tensor([torch.finfo(torch.float32).min, 0.0]),
        torch.tensor([-torch.inf, torch.nan, 0.0, 2.0]),
        torch.zeros(0),
        torch.randn(5).half(),
        torch.randn(5).double(),
        torch.tensor([1, 2]),
    ]
    stash.append((usual, exact))
    back, others = stash[0]
    assert back.dtype == torch.float32
    assert 0 < float((back - usual).abs().max()) <= 2**-11 * float(usual.abs().max())
    for before, after in zip(exact, others, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    room.close()


def test_what_nobody_knows_how_to_copy_is_refused():
    room = Room(1)
    with pytest.raises(UnknownValueError, match="a generator cannot be copied"):
        Stash(room).append({"x": (i for i in range(3))})
    room.close()
    loop: list[Any] = [torch.ones(2)]
    loop.append(loop)
    copy = mapped(loop, torch.Tensor.clone)
    assert copy[1] is copy


def test_a_stash_keeps_what_does_not_fit_in_files():
    room = Room(1 / 1024)
    stash = Stash(room)
    values = [((torch.full((100,), float(i)),), {"scale": torch.ones(3)}) for i in range(6)]
    for value in values:
        stash.append(value)
    extra = room.write([])
    folder = extra.parent
    extra.unlink()
    assert len(list(folder.iterdir())) == 4, "a kilobyte holds two of six"
    assert [v[0][0][0].item() for v in stash] == [0, 1, 2, 3, 4, 5]
    stash.clear()
    assert not list(folder.iterdir())
    assert room.take(1000), "room is given back"
    room.close()
    assert not folder.exists()
    with pytest.raises(RunError, match=r"cannot keep activations in .*; free some space there, name another folder"):
        room.write([])
