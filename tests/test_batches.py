"""What calibration takes of a loader's batches: labels are left out, what the network needs is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tspc
from tspc.calibration.batches import check_nothing_is_missing
from tspc.calibration.samples import Calibration
from tspc.errors import DataError

IDS, MASK, LABELS = torch.randint(9, (4, 6)), torch.ones(4, 6).long(), torch.tensor([0, 1, 2, 5])
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


@pytest.mark.parametrize(
    ("model", "batch", "name"),
    [
        (Text(), (IDS, MASK), "attention_mask"),
        (Text(), [IDS, MASK], "attention_mask"),
        (Text(), (IDS, MASK, LABELS), "attention_mask"),
        (Text(), (IDS, LABELS, MASK), "attention_mask"),
        (Text(), (IDS, MASK.bool()), "attention_mask"),
        (Text(), (IDS, {"attention_mask": MASK}), "attention_mask"),
        (nn.DataParallel(Text()), (IDS, MASK), "attention_mask"),
        (Named(), (IDS, MASK), "padding_mask"),
        (Pair(), (IMAGES, LABELS), "timestep"),
        (Lengths(), (IDS, LABELS), "lengths"),
        (Masked(), (IMAGES, torch.ones(4, 8, 8).bool()), "attn_mask"),
    ],
)
def test_what_the_network_would_take_is_not_left_out(model, batch, name):
    with pytest.raises(DataError, match=f"takes '{name}' beside its first input.*wrap the network in a module"):
        check_nothing_is_missing(model, batch)


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
        (Masked(), (IMAGES, LABELS)),
        (Masked(), (IMAGES, torch.rand(4, 10))),
        (nn.Sequential(nn.Flatten()), (IMAGES, LABELS)),
        (nn.DataParallel(Image()), (IMAGES, LABELS)),
    ],
)
def test_labels_are_left_out_without_a_word(model, batch):
    check_nothing_is_missing(model, batch)


def test_compress_refuses_masks_and_takes_labels():
    settings = Calibration(samples=8, batch_size=4)
    with pytest.raises(DataError, match=r"attention_mask.*\(4, 6\) at place 2"):
        tspc.compress(Text(), "svd", 0.5, calibration=[(IDS, MASK)], settings=settings)
    for batches in ([{"input_ids": IDS}], [((IDS, MASK), LABELS)]):
        with pytest.raises(DataError, match=r"not (dict|tuple).*wrap the network in a module"):
            tspc.compress(Text(), "svd", 0.5, calibration=batches, settings=settings)
    torch.manual_seed(0)
    model = Text()
    alone, labelled = (
        tspc.compress(model, "svd", 0.5, calibration=batches, settings=settings)
        for batches in ([IDS, IDS], [(IDS, LABELS), (IDS, LABELS)])
    )
    assert torch.equal(alone.hidden.weight, labelled.hidden.weight)
