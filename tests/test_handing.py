"""Blocks that take more than the output of the block before: they are run from what is kept, not from the start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_walk import assert_seen, seen_by_the_whole
from tspc.calibration.gathering import moments_of
from tspc.calibration.samples import Calibration, Samples
from tspc.calibration.targets import moments_in_turn
from tspc.compression.compress import compress
from tspc.traversal.copying import copied

WIDTH = 6


class Attending(nn.Module):
    """Takes hidden states, a mask and a table; gives back a tuple. `spoils` changes the mask in place."""

    def __init__(self, spoils: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.spoils = spoils

    def forward(self, x: torch.Tensor, mask: torch.Tensor, tables: Any = None, scale: float = 1.0) -> tuple:
        positions, _ = tables
        h = x + positions
        if self.spoils:
            mask += 0.1
        scores = self.q(h) @ self.k(h).mT * scale + mask
        return x + self.out(scores.softmax(-1) @ h), scores


class Encoder(nn.Module):
    """The argument `scale` may be constant, vary with the inputs, or vary in a way of its own in each block."""

    def __init__(self, depth: int, spoils: bool = False, scale: str = "constant") -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Attending(spoils) for _ in range(depth))
        self.head, self.scale = nn.Linear(WIDTH, 3), scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        mask = torch.zeros(len(ids), 1, ids.shape[1]).masked_fill(ids[:, None] == 0, -1e9)
        tables = torch.linspace(-1, 1, ids.shape[1])[:, None], None
        for number, block in enumerate(self.blocks):
            scale = {"constant": 0.5, "varies": 1 / len(ids), "apart": (1 + number) / len(ids)}[self.scale]
            x, _ = block(x, mask, tables=tables, scale=scale)
        return self.head(x.mean(1))


def words(count: int = 40) -> torch.Tensor:
    ids = torch.randint(1, 20, (count, 7), generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(torch.arange(7) > torch.arange(count)[:, None] % 5 + 2, 0)


SETTINGS = Calibration(batch_size=8, patches=10**9, sensitivity=False)


@pytest.mark.parametrize("memory", [0, 64])
@pytest.mark.parametrize("kind", ["constant", "spoils", "varies", "apart"])
def test_every_layer_sees_what_it_sees_in_the_whole_network(kind, memory):
    torch.manual_seed(0)
    model = Encoder(3, kind == "spoils", "constant" if kind == "spoils" else kind).eval()
    x = words()
    names = [f"blocks.{i}.{layer}" for i in range(3) for layer in ("q", "k", "out")]
    settings = replace(SETTINGS, memory=memory)  # every row counts 1
    with Samples(x, settings) as samples:
        trace = samples.survey(model, names).trace
        follows = [segment.call is not None for segment in trace.segments]
        assert follows == [False, *([kind in ("constant", "varies")] * 2)], "only what is handed on unchanged is kept"
        found = dict(moments_of(model, names, samples, trace))
    for name in names:
        wanted = torch.cat([seen_by_the_whole(model, name, part).flatten(0, -2) for part in x.split(8)])
        assert_seen(found[name], wanted, model.get_submodule(name))


def test_passes_over_the_network_do_not_grow_with_its_depth():
    def passes(depth: int) -> int:
        torch.manual_seed(0)
        model = Encoder(depth).eval()
        count = [0]
        model.words.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        compress(model, "svd", 0.5, calibration=words(), settings=SETTINGS)
        return count[0]

    assert passes(3) == passes(9) > 0


def test_layers_with_the_same_input_share_a_pass():
    torch.manual_seed(0)
    model = Encoder(2).eval()
    with Samples(words(), SETTINGS) as samples:
        trace = samples.survey(model, [f"blocks.0.{layer}" for layer in ("q", "k", "out")]).trace
    assert trace.same_input == {"blocks.0.q": "blocks.0.q", "blocks.0.k": "blocks.0.q", "blocks.0.out": "blocks.0.out"}


def test_layers_with_the_same_rows_have_the_moments_that_each_has_alone():
    torch.manual_seed(0)
    model, names = Encoder(2).eval(), [f"blocks.{i}.{layer}" for i in range(2) for layer in ("q", "k", "out")]
    found = {}
    for together in (True, False):
        with Samples(words(), SETTINGS) as samples:
            trace = samples.survey(model, names).trace
            if not together:
                trace = replace(trace, same_input={name: name for name in names})
            found[together] = {}
            for name, moments in moments_in_turn(model, copied(model), names, samples, trace):
                layer = model.get_submodule(name)
                found[together][name] = moments.statistics(layer.weight, True, 1e-3)
    one, other = (found[True][name] for name in ("blocks.0.q", "blocks.0.k"))
    assert one.inputs is other.inputs, "summed once"
    for name in names:
        for field in ("target", "inputs", "cross", "outputs", "mean_y"):
            torch.testing.assert_close(getattr(found[True][name], field), getattr(found[False][name], field))


def test_the_layers_themselves_do_not_run_for_their_inputs():
    torch.manual_seed(0)
    model = Encoder(1).eval()
    names, work, calls = ["blocks.0.q", "blocks.0.k", "blocks.0.out"], copied(model), []
    for name in names:
        layer = work.get_submodule(name)
        layer.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    with Samples(words(), SETTINGS) as samples:
        trace = samples.survey(model, names).trace
        for name, _ in moments_in_turn(model, work, names, samples, trace):
            assert name not in calls, "only later layers need the output, after the layer was replaced"
    assert set(calls) == {"blocks.0.q", "blocks.0.k"}
