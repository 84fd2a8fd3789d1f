"""Networks that choose which layers see which inputs: the compressed one may choose otherwise."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from tests.test_phases import DISTILLATION
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.compress import compress
from tspc.data import ModelInputs, kinds_of
from tspc.errors import TspcWarning
from tspc.phases.distill import distill
from tspc.training import Progress
from tspc.traversal.regular import is_regular


class Routed(nn.Module):
    """Each row goes through one of three experts."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(channels, 12)
        self.router = nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.middle, self.head = nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x.flatten(2).transpose(1, 2) if x.ndim == 4 else x))
        choice, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out[choice == number] = expert(x[choice == number])
        return self.head(F.relu(self.middle(out)).mean(1))


EXPERTS = [f"experts.{number}" for number in range(3)]


def routed(channels: int = 12) -> Routed:
    """Its router sends some rows to each expert."""
    torch.manual_seed(0)
    model = Routed(channels).eval()
    nn.init.normal_(model.router.weight)
    nn.init.zeros_(model.router.bias)
    return model


def named(told: list[warnings.WarningMessage], what: str) -> set[str]:
    """The layers that the warnings about this name."""
    texts = [str(warning.message) for warning in told if warning.category is TspcWarning]
    return {name for text in texts if what in text for name in re.findall(r"experts\.\d", text)}


class Translating(nn.Module):
    """Adds what it reads in sounds of one length to texts of many lengths; knows of no masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.words, self.write = nn.Linear(12, 16), nn.Embedding(20, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, sounds: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        x = self.words(decoder_input_ids) + F.relu(self.read(sounds)).mean(1, keepdim=True)
        return self.head(F.relu(self.write(x)))


def test_lengths_of_a_second_input_are_no_choice_of_the_network():
    given = [
        {"sounds": torch.randn(4, 6, 12), "decoder_input_ids": torch.randint(0, 20, (4, length))}
        for length in (5, 3, 7, 3)
    ]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compress(Translating(), "svd", 0.5, calibration=given, settings=Calibration(batch_size=4))
    assert not [str(warning.message) for warning in told if "reach" in str(warning.message)]
    assert len(kinds_of([ModelInputs((), batch) for batch in given])) == 3
    with Samples(given, Calibration(batch_size=4)) as samples:
        samples.survey(Translating().eval(), ["write"])
        assert len(samples.kept.kinds()) == 3


def test_shapes_follow_from_the_sizes_of_any_input():
    size = lambda *lengths: tuple(torch.Size((4, length)) for length in lengths)  # noqa: E731
    found = lambda *rows: [(torch.Size((each, 8)),) for each in rows]  # noqa: E731
    sizes = [size(6, 5), size(6, 3), size(6, 7)]
    assert is_regular(found(20, 12, 28), sizes)
    assert not is_regular(found(20, 13, 28), sizes)
    assert is_regular(found(20, 12, 20), [size(6, 5), size(6, 3), size(6, 5)])
    assert not is_regular(found(20, 12, 21), [size(6, 5), size(6, 3), size(6, 5)])


def test_an_expert_that_is_never_called_is_compressed_by_its_kernel_alone():
    model, x = routed(), torch.randn(60, 6, 12)
    with torch.no_grad():
        model.router.bias[2] = -1e3
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        small = compress(model, "svd", 0.4, calibration=x, settings=Calibration(batch_size=10), allocation="uniform")
    assert named(told, "are fitted to their own kernels") == {"experts.0", "experts.1"}
    alone = compress(model, "svd", 0.4, allocation="uniform")
    torch.testing.assert_close(small.experts[2].weight, alone.experts[2].weight)
    assert bool(torch.isfinite(small(x)).all())


def test_experts_are_not_distilled(context):
    reference = routed(3)
    small = compress(reference, "svd", 0.5, allocation="uniform")
    before = copy.deepcopy(small.state_dict())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        distill(small, reference, replace(DISTILLATION, steps=2, images=100), context, Progress())
    assert named(told, "it is not distilled") == set(EXPERTS)
    after = small.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("experts"))
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if key.startswith("middle"))
