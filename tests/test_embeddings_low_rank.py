"""Tables of embeddings as products of two factors, alone and tied to the output layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tspc
from tspc.calibration.samples import Calibration, Samples
from tspc.calibration.tables import in_sum, tables_of
from tspc.compression.curves import error_curves
from tspc.compression.integers import state_bytes
from tspc.compression.outline import outline
from tspc.compression.settings import PlanSettings
from tspc.decompositions import Metric, TensorTrain
from tspc.deploy.folding import plain
from tspc.errors import WeightsError
from tspc.layers.forms import LowRankTable, tensorized_layers
from tspc.models.safe_files import read_tensors

TOKENS, WIDTH = 240, 40
SETTINGS = Calibration(samples=64, batch_size=32)


class Speaker(nn.Module):
    """A network that tells the next token; with `tied` its output layer has the weight of its table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(TOKENS, WIDTH, padding_idx=0), nn.Embedding(12, WIDTH)
        self.middle = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH))
        self.head = nn.Linear(WIDTH, TOKENS, bias=True)
        self.norm = nn.LayerNorm(WIDTH)
        common = torch.randn(TOKENS, 10) @ torch.randn(10, WIDTH) / 3
        self.words.weight = nn.Parameter(common + 0.02 * torch.randn(TOKENS, WIDTH))
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(x + self.middle(x)))


def speaker(tied: bool = False) -> Speaker:
    return Speaker(tied).eval()


IDS = (torch.rand(64, 12, generator=torch.Generator().manual_seed(1)) ** 3 * TOKENS).long()


def small(tied: bool = False, **options: Any) -> nn.Module:
    given = {"rate": 0.6, "rate_scope": "network", "calibration": IDS, "settings": SETTINGS} | options
    return tspc.compress(speaker(tied), "svd", **given).eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("calibrated", [True, False])
@torch.no_grad()
def test_a_table_shares_the_budget_of_the_network(tmp_path, tied, calibrated):
    model, given = speaker(tied), IDS if calibrated else None
    made = tspc.plan(model, "svd", 0.6, rate_scope="network", calibration=given, settings=SETTINGS)
    result = small(tied, calibration=given)
    assert isinstance(result.words, LowRankTable)
    assert made.network_params == count(result) <= 0.6 * count(model)
    assert made.network_bytes == state_bytes(result)
    row = made.layers[0]
    assert (row.name, row.kind, row.path) == ("words", "Embedding", "chain")
    torch.testing.assert_close(result.words(IDS), result.words.weight[IDS])
    assert (result(IDS) - model(IDS)).norm() < 0.35 * model(IDS).norm()
    tspc.save(result, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < state_bytes(result) + 6_000
    loaded = tspc.load(tmp_path / "small.safetensors", speaker(tied))
    assert torch.equal(loaded(IDS), result(IDS))
    assert count(loaded) == count(result) == count(copy.deepcopy(result))
    assert not tied or loaded.head[1].weight is loaded.words.factor_list[1]
    assert not tied or "head.1.weight" not in read_tensors(tmp_path / "small.safetensors").tensors


@torch.no_grad()
def test_a_low_rank_is_better_than_the_other_layers_alone_at_the_same_size():
    model = speaker()
    whole, alone = small(rate=0.85), small(rate=0.85, exclude=["words", "places"])
    assert count(whole) <= 0.85 * count(model)
    one, two = ((network(IDS) - model(IDS)).norm() for network in (whole, alone))
    assert one < 0.5 * two


def test_frequent_tokens_are_kept_better():
    model = speaker()
    with torch.no_grad():
        model.words.weight.copy_(torch.randn(TOKENS, WIDTH))
    made = tspc.compress(model, "svd", 0.5, include=["words"], calibration=IDS, settings=SETTINGS)
    errors = (made.words.weight - model.words.weight).square().sum(1)
    often = torch.bincount(IDS.flatten(), minlength=TOKENS)
    assert errors[often.argsort()[-20:]].mean() < 0.5 * errors[often == 0].mean()


def test_a_budget_of_the_layers_leaves_tables_alone_unless_they_are_named():
    made = tspc.plan(speaker(), "svd", 0.5, calibration=IDS, settings=SETTINGS)
    assert not any(row.is_table for row in made.layers)
    made = tspc.plan(speaker(True), "svd", 0.5, include=["words", "middle.*"])
    assert [row.name for row in made.budgeted] == ["words", "middle.0", "middle.2"]
    made = tspc.plan(speaker(True), "svd", 0.5, include=["words", "middle.*"], exclude=["head"])
    assert made.layers[0].reason == "its weight is shared with head"


def test_the_norm_of_a_tied_table_has_the_inputs_of_the_output_layer():
    model = speaker(True)
    with Samples(IDS, SETTINGS) as samples:
        survey = samples.survey(model, [], ["words"])
        ((_, tied),) = tables_of(model, ["words"], samples, survey)
    other = speaker()
    with Samples(IDS, SETTINGS) as samples:
        survey = samples.survey(other, [], ["words"])
        ((_, alone),) = tables_of(other, ["words"], samples, survey)
    assert torch.equal(tied.metric.outputs, alone.metric.outputs)
    assert not torch.allclose(tied.metric.inputs, alone.metric.inputs)


def test_bits_training_and_plain_modules(tmp_path):
    result = small(rate=None, rate_scope="layers", size=0.12, bits=8)
    assert isinstance(result.words, LowRankTable)
    tspc.save(result, tmp_path / "small.safetensors")
    with torch.no_grad():
        loaded = tspc.load(tmp_path / "small.safetensors", speaker())
        assert torch.equal(loaded(IDS), result(IDS))
        torch.testing.assert_close(plain(result.words)(IDS), result.words(IDS))
        torch.testing.assert_close(result.words(IDS), result.words.weight[IDS])
    result = small(True).train()
    result(IDS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())
    assert not {"words", "head"} & tensorized_layers(result, tables=False).keys()


def test_a_plan_that_is_applied_ties_both_sides():
    model, made = speaker(True), tspc.plan(speaker(True), "svd", 0.6, rate_scope="network")
    bias = model.head.bias
    tspc.apply_(model, made)
    assert model.head[1].weight is model.words.factor_list[1]
    assert model.head.bias is bias
    assert count(model) == made.network_params


def test_a_table_in_two_places_is_one_table():
    model = speaker()
    model.same = model.words
    made = tspc.compress(model, "svd", 0.6, rate_scope="network")
    assert made.same is made.words
    assert isinstance(made.words, LowRankTable)


def test_a_file_whose_table_has_another_method_is_refused(tmp_path):
    result = small()
    result.words.decomposition = TensorTrain()
    result.words.rank = (3,)
    tspc.save(result, tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match="words"):
        tspc.load(tmp_path / "small.safetensors", speaker())


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_of_transformers_generates_and_stays_tied(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def network() -> Any:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=48, n_layer=2, n_head=4)).eval()
        model.get_input_embeddings().weight.copy_(0.02 * torch.randn(300, 9) @ torch.randn(9, 48))
        return model

    options = {"rate_scope": "network", "calibration": IDS, "settings": SETTINGS}
    result = tspc.compress(network(), "svd", 0.6, **options).eval()
    tspc.save(result, tmp_path / "small.safetensors")
    loaded = tspc.load(tmp_path / "small.safetensors", network())
    loaded.tie_weights()
    assert loaded.lm_head[1].weight is loaded.transformer.wte.factor_list[1]
    assert torch.equal(loaded(IDS).logits, result(IDS).logits)
    words = loaded.generate(IDS[:2, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(words, result.generate(IDS[:2, :4], max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_a_shared_table_weighs_what_both_of_its_uses_lose():
    """The squares of weights add up. Alone, the output layer has less: it knows how its outputs vary together."""

    def weights(tied: bool) -> dict[str, float]:
        model = speaker(tied)
        with torch.no_grad():
            model.head.weight.copy_(model.words.weight)
        asked = PlanSettings.of("svd", size="0.3")
        layers = outline(model, asked).layers
        with Samples(IDS, SETTINGS) as samples:
            curves = error_curves(model, layers, asked.method, samples, widths=asked.widths)
        return {name: found[0].weight for name, found in curves.items()}

    apart, together = weights(False), weights(True)
    both = apart["words"] ** 2 + apart["head"] ** 2
    assert 0.8 * both < together["words"] ** 2 < 3 * both


def test_two_norms_as_one():
    generator = torch.Generator().manual_seed(0)
    kernel, rows = torch.randn(30, 6, generator=generator), torch.randn(50, 6, generator=generator)
    one = Metric(torch.eye(6), torch.full((30,), 1 / 30))
    other = Metric(rows.T @ rows, torch.rand(30, generator=generator))
    found = in_sum(one, other, kernel)
    assert found.squared(kernel) == pytest.approx(one.squared(kernel) + other.squared(kernel), rel=1e-5)
    for seed in range(5):
        error = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
        assert found.squared(error) == pytest.approx(one.squared(error) + other.squared(error), rel=0.3)
