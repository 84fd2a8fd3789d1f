"""Padded positions are left out of layers that work position by position, and of rows in one axis in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.test_inputs import EXACT, LENGTHS, padded, texts
from tspc.calibration.gathering import moments_of
from tspc.calibration.row_order import BY_INPUT, BY_POSITION, MIXED, row_orders
from tspc.calibration.samples import Samples
from tspc.data.model_inputs import ModelInputs

WAYS = {
    "input by input": (lambda x: x, BY_INPUT),
    "position by position": (lambda x: x.transpose(0, 1), BY_POSITION),
    "rows of inputs": (lambda x: x.flatten(0, 1), BY_INPUT),
    "rows of positions": (lambda x: x.transpose(0, 1).flatten(0, 1), BY_POSITION),
    "rows by their values": (lambda x: x.flatten(0, 1)[x.flatten(0, 1)[:, 0].argsort()], MIXED),
}


class Arranged(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.way = WAYS[way][0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.mix(self.way(self.words(input_ids)))
        return self.head(x.relu()).reshape(len(input_ids), -1).sum(1, keepdim=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_front", [False, True])
def test_only_the_rows_of_texts_count(way, in_front):
    count = 7  # as many as tokens, so that the shapes do not tell inputs from positions
    batch = padded(texts()[:count])
    batch = {name: x.flip(1) for name, x in batch.items()} if in_front else batch
    model = Arranged(way).eval()
    with Samples(batch, EXACT) as samples:
        trace = samples.survey(model, ["mix", "head"]).trace
        found = dict(moments_of(model, ["mix"], samples, trace))["mix"]
    held = torch.ones_like(batch["attention_mask"]) if WAYS[way][1] == MIXED else batch["attention_mask"]
    rows = model.words(batch["input_ids"])[held.bool()].detach()
    assert found.count == len(rows) == (sum(LENGTHS[:count]) if WAYS[way][1] != MIXED else held.numel())
    mean = found.statistics(model.mix.weight, True, 1e-3).mean_x
    torch.testing.assert_close(mean[0].float(), rows.mean(0))


class Answering(Arranged):
    """Answers for each position of each text, whatever the order of the rows inside."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.head(self.mix(self.way(self.words(input_ids))).relu())
        count, length = input_ids.shape
        is_by_position = self.way in [way for way, order in WAYS.values() if order == BY_POSITION]
        return x.reshape(length, count, 3).transpose(0, 1) if is_by_position else x.reshape(count, length, 3)


@pytest.mark.parametrize("way", [way for way, (_, order) in WAYS.items() if order != MIXED])
def test_gradients_are_those_of_the_texts_in_any_order(way):
    batch = padded(texts()[:7])
    with Samples(batch) as samples, Samples(batch) as others:
        found = samples.survey(Answering(way).eval(), ["mix", "head"])
        wanted = others.survey(Answering("input by input").eval(), ["mix", "head"])
        for name in ("mix", "head"):
            assert wanted.weights(name) is not None
            torch.testing.assert_close(found.weights(name), wanted.weights(name))


def test_the_order_is_known_where_the_first_inputs_are_alike():
    (_, order), batch = WAYS["rows of positions"], padded([*texts()[:1], *texts()[:3]])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    names = ["mix", "head"]
    assert row_orders(Arranged("rows of positions"), names, ModelInputs(named=batch)) == dict.fromkeys(names, order)
    alike = ModelInputs(named={name: x[:2] for name, x in batch.items()})
    assert row_orders(Arranged("rows of positions"), names, alike) == dict.fromkeys(names, MIXED)
