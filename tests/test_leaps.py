"""A head is reached from the output of the last block, without the other blocks, where that gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.test_walk import assert_seen, seen_by_the_whole
from tspc.calibration.gathering import moments_of
from tspc.calibration.samples import Calibration, Samples
from tspc.traversal import leaps
from tspc.traversal.leaps import leap


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.second(self.first(x).relu())


class Network(nn.Module):
    """`kind` says what the head uses besides the output of the last block."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head, self.kind, self.kept = nn.Linear(4, 2), kind, torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, outputs = self.stem(x).relu(), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        if self.kind == "an earlier output":
            x = x + outputs[0]
        if self.kind == "an earlier sign" and isinstance(outputs[1], torch.Tensor) and outputs[1].mean() > 0:
            x = x + 1
        if self.kind == "what a block keeps":
            x = x + self.blocks[1].first.seen
        if self.kind == "random numbers":
            x = x + torch.rand(4)
        return self.head(torch.tanh(x))


def network(kind: str) -> Network:
    torch.manual_seed(0)
    model = Network(kind).eval()
    if kind == "what a block keeps":
        model.blocks[1].first.register_forward_hook(lambda module, args, out: setattr(module, "seen", out.mean()))
    return model


LAYERS = ["head", *(f"blocks.{i}.{layer}" for i in range(3) for layer in ("first", "second"))]


@pytest.mark.parametrize(
    ("kind", "leaps_to_it"),
    [
        ("nothing", True),
        ("random numbers", True),
        ("an earlier output", False),
        ("an earlier sign", False),
        ("what a block keeps", False),
    ],
)
def test_the_head_gets_what_it_gets_in_the_whole_network(kind, leaps_to_it):
    model, x = network(kind), torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    with Samples(x, Calibration(batch_size=10, patches=10**9, sensitivity=False)) as samples:
        trace = samples.survey(model, LAYERS).trace
        before = model.blocks[1].calls
        found = dict(moments_of(model, LAYERS, samples, trace))
        own = model.blocks[1].calls - before
    assert trace.segments[-1].skipped == (("blocks.0", "blocks.1", "blocks.2") if leaps_to_it else ())
    assert own == (2 if leaps_to_it else 4), "once for each batch, or again from the start"
    if kind != "random numbers":
        wanted = torch.cat([seen_by_the_whole(model, "head", part) for part in x.split(10)])
        assert_seen(found["head"], wanted, model.head)


def test_a_batch_in_which_the_leap_fails_runs_from_the_start(monkeypatch):
    model, x = network("nothing"), torch.randn(20, 4, generator=torch.Generator().manual_seed(1))

    def failing(*args: Any) -> Any:
        return None if args[5] == 1 else leap(*args)

    monkeypatch.setattr("tspc.traversal.walk.leap", failing)
    with Samples(x, Calibration(batch_size=10, patches=10**9, sensitivity=False)) as samples:
        trace = samples.survey(model, LAYERS).trace
        found = dict(moments_of(model, LAYERS, samples, trace))
    assert_seen(found["head"], seen_by_the_whole(model, "head", x), model.head)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x[0],
        lambda x: x.shape,
        lambda x: isinstance(x, torch.Tensor),
        len,
        bool,
        list,
        torch.relu,
        lambda x: torch.cat([x, x]),
        lambda x: x == 1,
    ],
)
def test_an_output_that_is_not_known_refuses_every_use(use):
    with pytest.raises((leaps._RefusedError, TypeError)):
        use(leaps.Absent())


def test_the_blocks_are_themselves_again_after_a_leap():
    model, x = network("nothing"), torch.randn(4, 4)
    wanted = model(x)
    model.blocks[1].forward = own = lambda x: x
    changed = model(x)
    assert leap(model, ["blocks.0", "blocks.1", "blocks.2"], x, "head", x) is not None
    assert model.blocks[1].forward is own
    torch.testing.assert_close(model(x), changed)
    del model.blocks[1].forward
    torch.testing.assert_close(model(x), wanted)
