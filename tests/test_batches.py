"""What a network takes of a loader's batches: labels are left out, what it needs goes by name or by place."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tspc
from tests.small import CPU
from tspc.calibration.samples import Calibration
from tspc.data import ModelInputs
from tspc.data.arranging import arranged, as_positional, collected, form_of
from tspc.errors import DataError, TspcWarning
from tspc.training import TOP1, HeldOut
from tspc.training.held_out import reader_of

IDS, LABELS = torch.randint(1, 9, (4, 6)), torch.tensor([0, 1, 2, 5])
MASK = (torch.arange(6) < torch.tensor([[6], [3], [5], [1]])).long()
IMAGES = torch.randn(4, 3, 8, 8)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(9, 16), nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        x = F.relu(self.hidden(self.embedding(input_ids)))
        weights = torch.ones_like(x[..., :1]) if attention_mask is None else attention_mask[..., None].to(x)
        return self.head((weights * x).sum(1) / weights.sum(1))


class Image(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x


class Masked(nn.Module):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return x


class Named(nn.Module):
    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        return x


class Pair(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x


class Lengths(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return x


class Keyed(nn.Module):
    def forward(self, **batch: Any) -> Any:
        return batch["input_ids"]


class Before(nn.Module):
    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        return x


class Read(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor


@dataclass
class Drawn:
    image: Tensor
    label: Tensor


def taken(model: nn.Module, batch: Any) -> Any:
    return arranged(model, collected(batch), form_of(batch))


@pytest.mark.parametrize(
    ("model", "batch", "names"),
    [
        (Text(), (IDS, MASK), ["attention_mask"]),
        (Text(), [IDS, MASK], ["attention_mask"]),
        (Text(), (IDS, MASK, LABELS), ["attention_mask"]),
        (Text(), (IDS, LABELS, MASK), ["attention_mask"]),
        (Text(), (IDS, MASK.bool()), ["attention_mask"]),
        (Text(), (IDS, {"attention_mask": MASK}), ["attention_mask"]),
        (Text(), {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, ["input_ids", "attention_mask"]),
        (Text(), UserDict(input_ids=IDS, token_types=IDS, name=["a"]), ["input_ids"]),
        (Text(), ({"input_ids": IDS, "attention_mask": MASK}, LABELS), ["input_ids", "attention_mask"]),
        (Text(), ((IDS, MASK), LABELS), ["attention_mask"]),
        (Text(), Read(IDS, MASK), ["input_ids", "attention_mask"]),
        (Text(), ModelInputs((IDS, MASK)), ["attention_mask"]),
        (Keyed(), {"input_ids": IDS, "mask": MASK, "labels": LABELS, "text": ["a"]}, ["input_ids", "mask"]),
        (nn.DataParallel(Text()), (IDS, MASK), ["attention_mask"]),
        (Named(), (IDS, MASK), ["padding_mask"]),
        (Pair(), (IMAGES, LABELS), ["timestep"]),
        (Lengths(), (IDS, LABELS), ["lengths"]),
        (Masked(), (IMAGES, torch.ones(4, 8, 8).bool()), ["attn_mask"]),
    ],
)
def test_what_the_network_takes_is_given(model, batch, names):
    found = taken(model, batch)
    assert list(found.named) == names
    assert found.first is (batch[0] if isinstance(batch[0], Tensor) else IDS) if isinstance(batch, tuple) else True


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Text(), IDS),
        (Text(), (IDS,)),
        (Text(), (IDS, LABELS)),
        (Text(), (IDS, {"labels": LABELS})),
        (Text(), (IDS, torch.full((4, 6), 7))),
        (Image(), (IMAGES, LABELS)),
        (Image(), (IMAGES, torch.rand(4, 10))),
        (Image(), (IMAGES, torch.zeros(4, 8, 8).long())),
        (Image(), (IMAGES, ["a", "b", "c", "d"], LABELS)),
        (Image(), Drawn(IMAGES, LABELS)),
        (Masked(), (IMAGES, LABELS)),
        (Masked(), (IMAGES, torch.rand(4, 10))),
        (nn.Sequential(nn.Flatten()), (IMAGES, LABELS)),
        (nn.DataParallel(Image()), (IMAGES, LABELS)),
    ],
)
def test_labels_are_left_out_without_a_word(model, batch):
    found = taken(model, batch)
    assert found is batch if isinstance(batch, Tensor) else isinstance(found, Tensor)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        # It may be a mask, or the class of each token.
        (Text(), (IDS, torch.tensor([[1, 0, 1, 0, 0, 1]] * 4)), "'attention_mask', or labels: give a dict"),
        (Text(), (IDS, MASK, LABELS, MASK), r"of shape \(4, 6\) at place 4 .* 'attention_mask'"),
        (Before(), (IMAGES, IMAGES), "'before', or labels"),
        (Text(), {"x": IDS, "y": LABELS}, "Text takes input_ids, .*, and a batch has x, y: name them"),
        (Text(), {"input_ids": [[1, 2]]}, r"dict without tensors \(input_ids: list\)"),
        (Text(), [["a"], LABELS], "begin with one.*not str in a list"),
        (Text(), "text", "a batch is str"),
    ],
)
def test_what_is_not_clear_is_refused(model, batch, message):
    with pytest.raises(DataError, match=message):
        taken(model, batch)


def test_a_mask_that_the_network_does_not_take_is_told():
    with pytest.warns(TspcWarning, match="Pair takes no attention_mask: the network treats padded positions"):
        taken(Pair(), {"x": IDS, "timestep": LABELS, "attention_mask": MASK})


def test_a_call_by_position_for_what_takes_no_names():
    assert as_positional(Text(), taken(Text(), {"attention_mask": MASK, "input_ids": IDS})) == (IDS, MASK)
    with pytest.raises(DataError, match="cannot go by position: wrap"):
        as_positional(Named(), ModelInputs((IDS,), {"other": MASK}))


def test_compress_takes_labels_and_leaves_them_out():
    settings = Calibration(samples=8, batch_size=4)
    torch.manual_seed(0)
    model = Text()
    alone, labelled, named = (
        tspc.compress(model, "svd", 0.5, calibration=batches, settings=settings)
        for batches in ([IDS, IDS], [(IDS, LABELS), (IDS, LABELS)], [{"input_ids": IDS, "labels": LABELS}] * 2)
    )
    for other in (labelled, named):
        assert torch.equal(alone.hidden.weight, other.hidden.weight)


class Numbers(nn.Module):
    """Text of token k has the class k if its mask says that there is something."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: None = None) -> Tensor:
        return F.one_hot((input_ids * attention_mask)[:, 0], 9).float()


def test_held_out_inputs_as_a_network_takes_them():
    given = [
        {"input_ids": torch.full((3, n), n), "attention_mask": torch.ones(3, n).long(), "labels": torch.full((3,), n)}
        for n in (4, 2, 4)
    ]
    read, count = reader_of(given, CPU, Numbers())
    parts = [*read(0, 5), *read(5, 9)]
    assert (count, sum(len(x) for x, _ in parts)) == (9, 9)
    for inputs, targets in parts:
        assert list(inputs.named) == ["input_ids", "attention_mask"]
        assert torch.equal(inputs.first[:, 0], targets)
    judge = HeldOut(Numbers(), TOP1, read, count, CPU)
    drop = judge.drop(Wrong(), 0, 9)
    assert (drop.lost, drop.gained) == (3, 0)
    with pytest.raises(DataError, match="a batch has no labels among input_ids"):
        reader_of([{"input_ids": torch.ones(2, 2)}], CPU, Numbers())
    assert reader_of([{"input_ids": torch.ones(2, 2)}], CPU, Numbers(), needs_labels=False)[1] == 2


class Wrong(Numbers):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: None = None) -> Tensor:
        return super().forward(input_ids.clamp(min=4), attention_mask)
