"""Inputs as networks take them: masks, many lengths, dicts; padded positions do not count."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tspc
from tspc.calibration.batches import Batches
from tspc.calibration.gathering import moments_of
from tspc.calibration.samples import Calibration, Samples
from tspc.calibration.sensitivity import output_sensitivity
from tspc.calibration.sketches import sketches_of
from tspc.calibration.tables import tables_of
from tspc.calibration.targets import moments_in_turn
from tspc.data import ModelInputs, masks_of
from tspc.errors import DataError
from tspc.training.held_out import reader_of
from tspc.traversal.copying import copied

WIDTH, WORDS = 8, 20
LENGTHS = (7, 3, 5, 2, 7, 4, 6, 1, 3, 7, 2, 5)
EXACT = Calibration(samples=64, batch_size=4, patches=10**9, sensitivity=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
        x = x + self.out(scores.softmax(-1) @ self.v(x))
        return x + self.down(self.up(x).relu())


class Encoder(nn.Module):
    """Has no mask for its blocks where nothing is padded, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        mask = None if attention_mask is None or attention_mask.all() else attention_mask[:, None].bool()
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        return {"loss": None, "logits": self.head(x)}


class Stacked(nn.Module):
    """The same in one tensor (N, 2, L)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, both: Tensor) -> Tensor:
        return self.network(both[:, 0], both[:, 1])["logits"]


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, WORDS, (1, length), generator=generator) for length in LENGTHS]


def padded(some: list[Tensor]) -> dict[str, Tensor]:
    longest = max(text.shape[1] for text in some)
    ids = torch.cat([nn.functional.pad(text, (0, longest - text.shape[1])) for text in some])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def batches(size: int = 4) -> list[dict[str, Tensor]]:
    """Of different lengths; the texts of the first batch are sorted, so that one of them has no padding."""
    ordered = sorted(texts(), key=lambda text: -text.shape[1])
    return [padded(ordered[start : start + size]) for start in range(0, len(ordered), size)]


NAMES = [f"blocks.{i}.{layer}" for i in range(3) for layer in ("q", "k", "v", "out", "up", "down")] + ["head"]


def statistics(inputs: Any, settings: Calibration = EXACT, model: nn.Module | None = None) -> dict[str, Any]:
    model = (model or Encoder()).eval()
    with Samples(inputs, settings) as samples:
        survey = samples.survey(model, NAMES)
        found = moments_in_turn(model, copied(model), NAMES, samples, survey.trace)
        return {name: m.statistics(model.get_submodule(name).weight, True, 1e-3) for name, m in found}


@pytest.mark.filterwarnings("error")
def test_padded_batches_have_the_moments_and_the_factors_of_their_texts_alone():
    model = Encoder().double()
    alone, together = statistics(texts(), model=model), statistics(batches(), model=model)
    assert list(alone) == list(together) == NAMES
    for name in NAMES:
        for field in ("target", "inputs", "cross", "outputs", "mean_x", "mean_y"):
            torch.testing.assert_close(getattr(together[name], field), getattr(alone[name], field))
    small = [tspc.compress(model, "svd", 0.5, calibration=x, settings=EXACT).eval() for x in (texts(), batches())]
    with torch.no_grad():
        torch.testing.assert_close(*(network(**batches()[0])["logits"] for network in small))


def test_without_its_mask_padding_counts():
    bare = statistics([batch["input_ids"] for batch in batches()])
    assert not torch.allclose(bare["head"].mean_x, statistics(texts())["head"].mean_x, rtol=1e-2)


def test_blocks_follow_each_other_with_and_without_padding():
    model = Encoder().eval()
    with Samples([batches()[0], padded(texts()[:1])], EXACT) as samples:
        found = samples.survey(model, NAMES).trace
        assert len(samples.kept.kinds()) == 2
    assert [segment.follows for segment in found.segments] == [False, True, True, True]


@pytest.mark.parametrize("first", [0, 1])
def test_a_mask_that_only_some_batches_have_reaches_every_block(first):
    model = Encoder().eval()
    given = [batches()[0], padded([texts()[0], texts()[4]])]
    given = given[::-1] if first else given
    with Samples(given, EXACT) as samples:
        found = dict(moments_of(model, NAMES, samples, samples.survey(model, NAMES).trace))
    for name in ("blocks.2.out", "head"):
        rows = []
        for batch in given:
            seen = seen_by(model, name, batch)
            rows.append(seen[batch["attention_mask"].bool()])
        wanted = torch.cat(rows)
        assert found[name].count == len(wanted)
        torch.testing.assert_close(
            found[name].statistics(model.get_submodule(name).weight, True, 1e-3).mean_x[0].float(), wanted.mean(0)
        )


def seen_by(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    rows: list[Tensor] = []
    layer = model.get_submodule(name)
    with torch.no_grad(), layer.register_forward_hook(lambda module, args, output: rows.append(args[0].clone())):
        model(**batch)
    return rows[0]


def test_a_dict_is_what_a_wrapper_of_one_tensor_is():
    model, settings = Encoder().eval(), Calibration(batch_size=4)
    # Without padding, because the wrapper has no mask that tells which positions count.
    ids = torch.randint(1, WORDS, (8, 7), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stacked = torch.stack((batch["input_ids"], batch["attention_mask"]), 1)
    named = tspc.compress(model, "svd", 0.5, calibration=batch, settings=settings)
    wrapped = tspc.compress(Stacked(model), "svd", 0.5, calibration=stacked, settings=settings)
    with torch.no_grad():
        pair = (network(**batch)["logits"] for network in (named, wrapped.network))
        torch.testing.assert_close(*pair)


def test_texts_of_any_lengths_are_compressed_alike_from_memory_and_from_files():
    model = Encoder().eval()
    small = [
        tspc.compress(model, "svd", 0.5, calibration=batches(), settings=Calibration(batch_size=4, memory=memory))
        for memory in (0, 64)
    ]
    with torch.no_grad():
        one, other = (network(**batches()[0])["logits"] for network in small)
    assert torch.equal(one, other)


def test_gradients_at_padded_positions_do_not_count():
    model = Encoder().eval()
    batch = ModelInputs((), batches()[0])
    found = dict(output_sensitivity(model, ["head"], [batch]))
    changed = batch.clone()
    changed.named["input_ids"][changed.mask.logical_not()] = 5
    again = dict(output_sensitivity(model, ["head"], [changed]))
    torch.testing.assert_close(found["head"], again["head"])
    # Nothing else than the numbers of real positions scales it: g is the direction itself.
    count = int(batch.mask.sum()) / len(batch)
    assert float(found["head"].trace()) == pytest.approx(3 * count, rel=0.5)


def test_sketches_and_counts_of_tokens_leave_padding_out():
    model, given = Encoder().eval(), batches()
    with Samples(given, EXACT) as samples:
        survey = samples.survey(model, NAMES)
        (_, counted), *_ = tables_of(model, ["words"], samples, survey)
        (_, sketch), *_ = sketches_of(model, ["blocks.0.q"], samples, survey)
    tokens = torch.cat([text.flatten() for text in texts()])
    expected = torch.bincount(tokens, minlength=WORDS) + 1.0
    torch.testing.assert_close(counted.metric.outputs.float(), expected / expected.sum())
    rows = model.words(tokens)
    size = float(sketch.metric.inputs.rows.square().sum())
    assert size == pytest.approx(float(rows.square().sum(1).mean().detach()), rel=1e-4)


def test_masks_by_their_names():
    ids, padding = torch.ones(2, 3).long(), torch.tensor([[False, False, True], [False, False, False]])
    for named in (
        {"src_key_padding_mask": padding},
        {"key_padding_mask": torch.zeros(2, 3).masked_fill(padding, -torch.inf)},
        {"attention_mask": (~padding).long()},
        {"attention_mask": torch.zeros(2, 3).masked_fill(padding, -1e9)},
    ):
        (found,) = masks_of(ModelInputs((ids,), named))
        assert torch.equal(found, ~padding)
    both = ModelInputs((ids,), {"attention_mask": (~padding).long(), "decoder_attention_mask": padding.logical_not()})
    assert len(masks_of(both)) == 1
    assert masks_of(ModelInputs((ids,), {"attention_mask": torch.ones(2, 3)})) == []
    assert masks_of(ModelInputs((ids,), {"attention_mask": torch.zeros(2, 1, 3, 3)})) == []


class Opaque(Encoder):
    """Hands each of its blocks an iterator, which cannot be kept."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        shared, x = iter([input_ids]), self.words(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None].bool()
        for block in self.blocks:
            x = block(x, mask, shared)
        return self.head(x)


def test_what_cannot_be_kept_sends_the_walk_back_to_the_start():
    plain, opaque = Encoder().eval(), Opaque().eval()
    for block in opaque.blocks:
        block.forward = lambda x, mask, shared, block=block: Block.forward(block, x, mask)  # type: ignore[assignment]
    found = {}
    for model in (plain, opaque):
        with Samples(batches(), EXACT) as samples, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found[model] = dict(moments_of(model, NAMES, samples, samples.survey(model, NAMES).trace))
        assert bool(seen) == (model is opaque)
    assert all("is called with a list_iterator, which cannot be kept" in str(warning.message) for warning in seen)
    for name in NAMES:
        layer = plain.get_submodule(name)
        pair = (moments[name].statistics(layer.weight, True, 1e-3).mean_x for moments in found.values())
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


class Torch(nn.Module):
    """PyTorch's own encoder, whose fast path would pack padded texts and call no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.words(x), src_key_padding_mask=src_key_padding_mask))


def test_pytorchs_own_encoder_shows_its_layers():
    given = [{"x": b["input_ids"], "src_key_padding_mask": b["attention_mask"] == 0} for b in batches()]
    model = Torch().eval()
    names = [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)] + ["head"]
    with Samples(given, EXACT) as samples:
        trace = samples.survey(model, names).trace
        found = dict(moments_of(model, names, samples, trace))
    assert [segment.follows for segment in trace.segments] == [False, True, True]
    assert {name: moments.count for name, moments in found.items()} == dict.fromkeys(names, sum(LENGTHS))


class Vectors(Encoder):
    """Takes vectors instead of the numbers of tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for block in self.blocks:
            x = block(x, None if mask is None else mask[:, None].bool())
        return self.head(x)


def vectors(length: int, count: int = 4) -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.tensor([[length], [2], [length], [1]])[:count]).long()
    return {"x": torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(length)), "mask": mask}


@pytest.mark.filterwarnings("error")
def test_sequences_of_vectors_have_many_lengths():
    given = [vectors(6), vectors(3), vectors(5)]
    for form in (lambda batch: batch, lambda batch: ModelInputs((batch["x"], batch["mask"])), lambda batch: batch["x"]):
        found = statistics([form(batch) for batch in given], model=Vectors())
        assert list(found) == NAMES
    read, count = reader_of([(batch["x"], torch.zeros(4)) for batch in given], torch.device("cpu"))
    assert count == sum(len(inputs) for inputs, _ in read(0, count)) == 12
    bare = lambda *sizes: [torch.rand(2, *each) for each in sizes]  # noqa: E731
    for given in (bare((3, 8, 8), (3, 9, 9)), bare((5,), (6,))):
        with pytest.raises(DataError, match="not all of one size"):
            list(Batches(given, 8, 4))
    masked = [{"x": x, "pixel_mask": x > 0} for x in bare((3, 8, 8), (3, 9, 9))]
    assert len(list(Batches(masked, 8, 4))) == 2
