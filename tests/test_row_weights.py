"""The positions of a text count by how much the answer depends on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tspc
from tspc.calibration.gathering import moments_of
from tspc.calibration.moments import Moments
from tspc.calibration.patches import Positions
from tspc.calibration.projections import direction_of
from tspc.calibration.row_order import BY_INPUT, BY_POSITION
from tspc.calibration.samples import Samples
from tspc.calibration.texts import is_encoder, is_text
from tspc.calibration.weights import EVEN, VOCABULARY, RowWeights
from tspc.compression.curves import error_curves
from tspc.compression.outline import outline
from tspc.compression.settings import PlanSettings
from tspc.data.model_inputs import ModelInputs
from tspc.errors import DataError


class Reader(nn.Module):
    """Reads its answer from the first position of a text; a layer may be called twice."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) if not x.is_floating_point() else x
        for _ in range(self.calls):
            x = torch.tanh(self.inner(x))
        return self.head(x[:, 0])


def texts(length: int = 5) -> Tensor:
    return torch.randint(20, (24, length), generator=torch.Generator().manual_seed(0))


def test_the_weight_of_a_row_is_how_often_it_counts() -> None:
    torch.manual_seed(0)
    x, y, weights = torch.randn(1, 60, 5), torch.randn(60, 3), torch.randint(4, (60,)).float()
    weighted, repeated = (Moments(5, 3, x.device) for _ in range(2))
    weighted.add(x[:, :40], y[:40], weights=weights[:40])
    weighted.add(x[:, 40:], y[40:], weights=weights[40:])
    times = weights.long()
    repeated.add(x.repeat_interleave(times, 1), y.repeat_interleave(times, 0))
    kernel = torch.randn(3, 5)
    found, wanted = (m.statistics(kernel, True, 1e-3) for m in (weighted, repeated))
    for key in ("inputs", "cross", "outputs", "mean_x", "mean_y"):
        torch.testing.assert_close(getattr(found, key), getattr(wanted, key), rtol=1e-5, atol=1e-6)


def weights(model: nn.Module, inputs: Any) -> Tensor | None:
    model.eval()
    with Samples(inputs) as samples:
        samples.survey(model, ["inner"])
        return samples.weights.at(["inner"], 0, Positions(), 24 * 5)


def test_positions_that_the_answer_does_not_see_count_little() -> None:
    found = weights(Reader(), texts())
    assert found is not None
    first, others = found.reshape(24, 5)[:, 0], found.reshape(24, 5)[:, 1:]
    assert float(first.mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(others, torch.full_like(others, EVEN))


@pytest.mark.parametrize("case", ["called twice", "no text"])
def test_all_positions_count_alike_where_their_gradients_tell_nothing(case: str) -> None:
    twice = case == "called twice"
    assert weights(Reader(2 if twice else 1), texts() if twice else torch.randn(24, 5, 12)) is None


@pytest.mark.parametrize("inputs", [texts(), torch.randn(24, 5, 12, generator=torch.Generator().manual_seed(0))])
def test_a_layer_of_a_text_network_weighs_its_share_in_the_answer(inputs: Tensor) -> None:
    model = Reader().eval()
    sketch = outline(model, PlanSettings.of("svd", 0.5, min_params=0, keep_last=False))
    layers = [layer for layer in sketch.layers if layer.name == "inner"]
    with Samples(inputs) as samples:
        (curve,) = error_curves(model, layers, sketch.settings.method, samples)["inner"]
        survey = samples.survey(model, ["inner"])
        own = model.inner
        ((_, moments),) = moments_of(model, ["inner"], samples, survey.trace)
        share = survey.metric("inner", own, moments, samples).squared(own.weight.detach().double())
    assert curve.weight == pytest.approx(share if not inputs.is_floating_point() else share**0.5, rel=1e-3)


def test_a_language_model_is_no_encoder() -> None:
    speaker = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, VOCABULARY))
    with Samples(texts()) as samples:
        assert is_encoder(Reader(), samples)
        assert is_encoder(speaker[0], samples)
        assert not is_encoder(speaker, samples)


def test_texts_are_known_wherever_they_stand_among_the_arguments() -> None:
    sound, tokens, mask = torch.randn(3, 4, 9), torch.ones(3, 5, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)
    heard = {"input_features": sound, "decoder_input_ids": tokens, "decoder_attention_mask": mask}
    assert is_text([ModelInputs(named=heard)])
    assert is_text([ModelInputs([tokens])])
    assert not is_text([ModelInputs(named={"input_values": sound[:, 0], "attention_mask": mask})])
    assert not is_text([ModelInputs([sound, torch.tensor([9, 8, 4])])])  # the lengths of the sounds
    assert not is_text([sound])
    pixels, ones = torch.randn(3, 3, 8, 8), torch.ones(3, 8, 8, dtype=torch.long)
    assert not is_text([ModelInputs(named={"pixel_values": pixels, "pixel_mask": ones})])
    assert not is_text([ModelInputs(named={"pixel_values": pixels, "image_sizes": ones[:, 0, :2]})])


@pytest.mark.parametrize("number", [20, -21])
def test_tokens_that_the_network_does_not_know(number: int) -> None:
    wrong = texts()
    wrong[-1, -1] = number
    with pytest.raises(DataError, match=f"does not know the token {number} of the calibration inputs .* tokenizer"):
        tspc.compress(Reader(), "svd", 0.5, calibration=wrong)


def test_the_weights_of_tokens_that_may_come_next() -> None:
    """The directions for the logits of a language model lie among likely tokens, and are as long where it is sure."""
    logits, generator = torch.zeros(1, 2, VOCABULARY), torch.Generator().manual_seed(0)
    logits[0, 0, :3] = torch.tensor([20.0, 21.0, 19.0])
    logits[0, 1, :3] = torch.tensor([30.0, 21.0, 19.0])
    found = torch.stack([direction_of(logits, generator, [])[0] for _ in range(500)])
    torch.testing.assert_close(found.norm(dim=2), torch.ones(500, 2), rtol=0.1, atol=0)
    assert float(found.sum(2).abs().max()) < 0.02  # a constant added to all logits changes nothing
    assert float(found[..., 3:].abs().max()) < 0.05
    unsure, sure = found[..., :3].square().mean(0)
    assert float(sure[0]) > float(sure[1]) > float(sure[2])  # the likeliest token against the next ones
    assert float(unsure.min()) > 0.1  # all three may come next


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        (Positions(), list(range(48))),
        (Positions(2, (1, 0)), list(range(2, 48, 4))),  # a dense layer: every fourth row
        (Positions(2, (1, 0), (4, 6)), [6, 8, 10, 18, 20, 22, 30, 32, 34, 42, 44, 46]),  # two maps of 4 × 6
        (Positions(3, (0, 2), (24,)), [*range(2, 24, 3), *range(26, 48, 3)]),  # two signals
        (Positions(2, (0, 1, 1), (2, 3, 4)), [5, 7, 29, 31]),  # two volumes
        (Positions(2, (1, 0), (5, 6)), None),  # 48 rows are no maps of 5 × 6
    ],
)
def test_weights_are_those_of_the_rows_that_are_used(positions: Positions, wanted: list[int] | None) -> None:
    weights = RowWeights()
    weights.add("layer", 0, 0, torch.arange(48.0)[:, None])
    weights.finish(["layer"], 1, {})
    found = weights.at(["layer"], 0, positions, 48 if wanted is None else len(wanted))
    every = weights.at(["layer"], 0, Positions(), 48)
    assert every is not None
    if wanted is None:
        assert found is None
    else:
        assert found is not None
        torch.testing.assert_close(found, every[wanted])


@pytest.mark.parametrize("order", [BY_INPUT, BY_POSITION])
def test_rows_of_a_divided_batch_are_known_only_input_by_input(order: str) -> None:
    weights = RowWeights()
    for part in range(2):
        weights.add("layer", 0, part, torch.ones(6, 2))
    weights.finish(["layer"], 1, {"layer": order})
    assert (weights.at(["layer"], 0, Positions(), 12) is None) == (order == BY_POSITION)
