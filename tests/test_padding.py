"""Which positions a mask calls padded, whatever its name and its polarity; tables of attention are no such masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tspc.data.model_inputs import ModelInputs, joined, masks_of
from tspc.errors import TspcWarning

LENGTHS = torch.tensor([[5], [3], [1], [4]])
FILLED = torch.arange(5) < LENGTHS
SHORT = torch.arange(6) < LENGTHS
CAUSAL = torch.full((4, 4), -torch.inf).triu(1)


def inputs(filled: Tensor, padding: float = 0.0) -> Tensor:
    x = torch.randn(*filled.shape, 3, generator=torch.Generator().manual_seed(0))
    return torch.where(filled[..., None], x, torch.full((), padding))


@pytest.mark.parametrize("name", ["mask", "padding_mask", "pad_mask", "attention_mask", "decoder_padding_mask"])
@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("filled", [FILLED, FILLED.flip(1), SHORT, SHORT.flip(1)])
@pytest.mark.filterwarnings("error")
def test_a_mask_shows_whether_it_is_true_at_text_or_at_padding(name, kind, filled):
    for mask in (filled, ~filled):
        (found,) = masks_of(ModelInputs((), {"x": inputs(filled, 2.0), name: mask.to(kind)}))
        assert torch.equal(found, filled)


@pytest.mark.filterwarnings("error")
def test_without_padding_nothing_is_left_out():
    for mask in (torch.ones(4, 5).bool(), torch.zeros(4, 5).bool()):
        assert masks_of(ModelInputs((), {"x": inputs(FILLED), "padding_mask": mask})) == []
    # Positions that are missing in between: no padding, so 1 is what is there.
    holes = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 1], [0, 1, 1, 1, 0], [0, 1, 0, 0, 0]])
    (found,) = masks_of(ModelInputs((), {"x": inputs(FILLED), "mask": holes}))
    assert torch.equal(found, holes.bool())


@pytest.mark.parametrize(("name", "is_text"), [("mask", True), ("padding_mask", False), ("attention_mask", True)])
def test_what_nothing_shows_is_read_by_its_name_and_told(name, is_text, recwarn):
    noise = torch.randn(4, 6, 3)
    (found,) = masks_of(ModelInputs((), {"x": noise, name: SHORT}))
    assert torch.equal(found, SHORT if is_text else ~SHORT)
    told = [str(warning.message) for warning in recwarn if warning.category is TspcWarning]
    assert len(told) == (0 if name == "attention_mask" else 1)
    assert all(f"whether {name} is true at text or at padding" in text for text in told)


@pytest.mark.parametrize("table", [CAUSAL, CAUSAL < 0, CAUSAL == 0, (CAUSAL == 0).triu(-1)])
@pytest.mark.parametrize("name", ["mask", "attn_mask", "src_mask"])
def test_the_mask_of_a_causal_attention_is_one_for_all_inputs(table, name):
    batch = ModelInputs((), {"x": torch.randn(4, 4, 3), name: table})
    assert masks_of(batch) == []
    assert torch.equal(batch[:2].named[name], table)
    assert [part.named[name].shape for part in batch.split(1)] == [table.shape] * 4
    both = joined([batch, batch])
    assert isinstance(both, ModelInputs)
    assert len(both) == 8
    assert torch.equal(both.named[name], table)
    if table.dtype == torch.bool or bool(table.isinf().any()):
        assert torch.equal(ModelInputs((torch.randn(4, 4, 3), table))[:2].positional[1], table)


def test_as_many_texts_as_tokens_keep_their_own_masks():
    for filled in (FILLED[:, :4], torch.arange(4) < torch.tensor([[3], [4], [4], [4]]), torch.ones(4, 4).bool()):
        batch = ModelInputs((), {"x": inputs(filled), "mask": filled, "attention_mask": filled})
        assert batch[:2].named["mask"].shape == batch[:2].named["attention_mask"].shape == (2, 4)
    places = ModelInputs((), {"x": torch.randn(4, 4), "position_ids": torch.arange(4), "timestep": torch.arange(4)})
    assert (len(places[:2].named["position_ids"]), len(places[:2].named["timestep"])) == (4, 2)
