"""How much the answer depends on the layers: of any network that has gradients somewhere, in bounded memory."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tspc
from tests.test_calibration import images, resnet
from tspc.calibration import products, sensitivity
from tspc.calibration.samples import Calibration
from tspc.calibration.sensitivity import output_sensitivity
from tspc.compression.outline import outline
from tspc.compression.settings import PlanSettings
from tspc.errors import TspcWarning


class Body(nn.Module):
    """Takes sequences of vectors, answers with logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(6, 10), nn.Linear(10, 12), nn.Linear(12, 4)

    def block(self, x: Tensor) -> Tensor:
        return F.relu_(self.two(F.relu(self.one(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Text(Body):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.embedding(ids))


class Rounded(Text):
    """Whole numbers inside: what lies before them has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x).abs().long().clamp(max=8))


class Reentrant(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=True).mean(1))


class ReentrantText(Text):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.embedding(ids), use_reentrant=True).mean(1))


class Several(Body):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"length": x.shape[1], "kept": (torch.ones(3), super().forward(x)), "more": x}


class Without(Body):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def measured(
    model: nn.Module, x: Tensor, layers: tuple[str, ...] = ("one", "two", "head"), short: bool = False
) -> dict[str, Tensor]:
    return dict(output_sensitivity(model.eval(), layers, [x[:3], x[3:]], short=short))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-4, atol=1e-6)


VECTORS, IDS = torch.randn(5, 7, 6), torch.randint(9, (5, 7))


@pytest.mark.parametrize("short", [False, True])
def test_it_is_what_the_definition_says(short):
    """Behind the last nonlinearity the gradient is known: of the mean over 7 positions a seventh of Wᵀd at each."""
    model = Body()
    generator, expected = torch.Generator().manual_seed(0), torch.zeros(4, 4)
    for size in (3, 2):
        for _ in range(sensitivity.PROBES):
            direction = torch.randn((size, 4), generator=generator)
            direction -= direction.mean(1, keepdim=True)
            expected += direction.T @ direction / (5 * sensitivity.PROBES)
    share = min(1.0, 4 / (5 * sensitivity.PROBES))
    shrunk = (1 - share) * expected + share * expected.diagonal().mean() * torch.eye(4)
    digits = {"rtol": 2e-2, "atol": 1e-2} if short else {}
    torch.testing.assert_close(measured(model, VECTORS, short=short)["head"], shrunk, **digits)


def test_of_token_numbers_it_begins_with_the_first_floating_activation():
    model, body = Text(), Body()
    same(measured(model, IDS), measured(body, model.embedding(IDS).detach()))


@pytest.mark.parametrize(("model", "x"), [(Reentrant(), VECTORS), (ReentrantText(), IDS)])
def test_reentrant_checkpoints_do_not_hinder_it(model, x):
    plain = (Body if x is VECTORS else Text)()
    plain.load_state_dict(model.state_dict())
    same(measured(model, x), measured(plain, x))


def test_an_answer_in_a_structure_counts():
    same(measured(Several(), VECTORS), measured(Body(), VECTORS))


def test_layers_before_whole_numbers_are_named_and_the_others_measured():
    x = 4 * torch.randn(5, 5)
    model = Rounded()
    with pytest.warns(
        TspcWarning, match=r"sensitivity: no finite gradient of the answer comes to first: their"
    ) as seen:
        found = measured(model, x, ("first", "one", "two", "head"))
    assert len(seen) == 1
    text = Text()
    text.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("first")})
    same(found, measured(text, model.first(x).abs().long().clamp(max=8)))


@pytest.mark.parametrize("kind", [Without, Rounded])
def test_compress_goes_on_without_gradients_and_says_so_once(kind):
    model, x = kind(), VECTORS if kind is Without else 4 * torch.randn(5, 5)
    with pytest.warns(TspcWarning, match=r"calibration\.sensitivity: ") as seen:
        small = tspc.compress(model, "svd", 0.6, calibration=x, settings=Calibration(samples=5))
    assert len(seen) == 1
    plain = tspc.compress(
        Without(), "svd", 0.6, calibration=VECTORS, settings=Calibration(samples=5, sensitivity=False)
    )
    if kind is Without:
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in small.state_dict().items())


def test_an_error_in_the_gradients_is_told_and_not_raised():
    class Odd(Body):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("no gradients today\nsecond line")
            return super().forward(x)

    with pytest.warns(TspcWarning, match=r"Odd gives no gradients \(no gradients today\): the outputs of all"):
        assert measured(Odd(), VECTORS) == {}


def test_many_outputs_have_the_diagonal_alone(monkeypatch):
    model = Body()
    full = measured(model, VECTORS)
    monkeypatch.setattr(products, "WIDEST_OUTPUT", 10)
    found = measured(model, VECTORS)
    torch.testing.assert_close(found["two"], full["two"].diagonal())
    assert {name: matrix.ndim for name, matrix in found.items()} == {"one": 2, "two": 1, "head": 2}


def test_layers_that_do_not_fit_together_are_measured_one_after_the_other(monkeypatch):
    expected = measured(Body(), VECTORS)
    monkeypatch.setattr(sensitivity, "TOGETHER", 120)
    same(measured(Body(), VECTORS), expected)


def test_only_layers_that_are_treated_are_measured_and_each_once(monkeypatch):
    asked: list[list[str]] = []

    def counted(model: nn.Module, layers: list[str], *rest: Any) -> object:
        asked.append(sorted(layers))
        return output_sensitivity(model, layers, *rest)

    monkeypatch.setattr("tspc.calibration.samples.output_sensitivity", counted)
    model = resnet()
    tspc.compress(model, "svd", 0.4, calibration=images(8), include=["layer3*"])
    assert outline(model, PlanSettings.of("svd", include=["layer3*"])).chosen
    assert [layers for layers in asked if layers] == [["layer3.0.conv1", "layer3.0.conv2", "linear"]]


def test_the_network_is_left_as_it_was():
    model = Text()
    model.one.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    measured(model, IDS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert [name for name, flag in asked.items() if not flag] == ["one.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_all_maps_of_a_backbone_count():
    """A layer behind the first map is measured by the maps behind it."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return OrderedDict(low=x, high=self.second(x))

    torch.manual_seed(0)
    found = dict(output_sensitivity(Backbone(), ["first", "second"], [torch.randn(16, 4)]))
    assert set(found) == {"first", "second"}
    # What reaches the first map also passes the second layer: more of the answer depends on it.
    assert float(found["first"].trace()) > float(found["second"].trace()) > 0
