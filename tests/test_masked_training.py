"""Phases on texts: batches are arguments with masks, of several lengths, and padding teaches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tspc
from tests.small import CPU
from tests.test_inputs import WIDTH, WORDS, Block, padded
from tspc.calibration.samples import Calibration
from tspc.data import Feed, ModelInputs
from tspc.errors import ConfigError
from tspc.phases.activations import Masked
from tspc.phases.agreement import keep_closer_
from tspc.phases.context import Context
from tspc.phases.distill import Distillation, _loss, distill
from tspc.phases.finetune import Finetuning, finetune
from tspc.terminal.display import Display
from tspc.training import METRICS, Hardware, Progress, evaluate
from tspc.training.evaluation import judged

COUNT = 48


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x, mask = self.words(input_ids), attention_mask.bool()
        for block in self.blocks:
            x = block(x, mask[:, None])
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"loss": None, "logits": self.head(mean)}


class Texts:
    """Texts whose class is that of their first token."""

    num_classes, train_size, test_size, fresh_size, fingerprint, fresh_fingerprint = 2, COUNT, COUNT, 0, "texts", ""

    def __init__(self, noise: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [3 + 2 * (number // 8 % 2) - number % 3 for number in range(COUNT)]
        self.texts = [torch.randint(1, WORDS, (1, size), generator=generator) for size in sizes]
        self.noise = noise

    def batch(self, start: int, size: int) -> tuple[ModelInputs, Tensor]:
        texts = self.texts[start : start + size]
        named = padded(texts)
        named["input_ids"] = named["input_ids"].masked_fill(named["attention_mask"] == 0, self.noise)
        return ModelInputs((), named), torch.tensor([int(text[0, 0]) % 2 for text in texts])

    def batches(self, size: int, count: int = COUNT) -> Iterator[tuple[ModelInputs, Tensor]]:
        return (self.batch(start, size) for start in range(0, count, size))

    def steps(self, feed: Feed) -> int:
        return COUNT // feed.batch_size

    def train_batches(self, feed: Feed, epoch: int, start: int = 0) -> Iterator[tuple[ModelInputs, Tensor]]:
        return (self.batch(step * feed.batch_size, feed.batch_size) for step in range(start, self.steps(feed)))

    def test_batches(self, batch_size: int, *args: Any) -> Iterator[tuple[ModelInputs, Tensor]]:
        return self.batches(8)

    def held_out_batches(self, count: int, *args: Any) -> Iterator[tuple[ModelInputs, Tensor]]:
        return self.batches(8, 16)

    def calibration_batches(self, count: int, *args: Any) -> Iterator[ModelInputs]:
        return (inputs for inputs, _ in self.batches(8))


def context(noise: int = 0) -> Context:
    data: Any = Texts(noise)
    return Context(data, Hardware(CPU), 0, Display())


SHORT: dict[str, Any] = {
    "epochs": 1,
    "learning_rate": 0.01,
    "batch_size": 8,
    "steps": 4,
    "evaluations": 1,
    "held_out": 16,
}


def trained(noise: int) -> nn.Module:
    reference, data = Classifier().eval(), context(noise).required_data
    batches = data.calibration_batches(COUNT, 8, CPU)
    small = tspc.compress(reference, "svd", 0.6, calibration=batches, settings=Calibration(batch_size=8))
    distill(small, reference, Distillation(images=COUNT, **SHORT), context(noise), Progress())
    finetune(small, reference, Finetuning(**SHORT), context(noise), Progress(), "finetune")
    return small


def test_the_phases_take_texts_and_padding_teaches_nothing():
    one, other = trained(0), trained(7)
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), Classifier().parameters(), strict=False))
    for (name, value), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if name != "words.weight":  # the optimizer may still decay what no text reads
            torch.testing.assert_close(value, again, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


class Keyed(Block):
    """A block that gives more than a tensor."""

    def forward(self, *args: Any) -> Any:
        return {"attention": None, "hidden": super().forward(*args)}


class Paired(Block):
    def forward(self, *args: Any) -> Any:
        x = super().forward(*args)
        return {"attention": x.softmax(2), "hidden": x}


class Named(Block):
    def forward(self, *args: Any) -> Any:
        x = super().forward(*args)
        return {"attention": x.softmax(2), "last_hidden_state": x}


class KeyedClassifier(Classifier):
    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x, mask = self.words(input_ids), attention_mask.bool()
        for block in self.blocks:
            x = list(block(x, mask[:, None]).values())[1]
        return self.head(x.mean(1))


@pytest.mark.parametrize("kind", [Keyed, Named])
def test_blocks_are_learnt_by_the_tensor_that_they_pass_on(kind: type[Block]):
    reference = KeyedClassifier(kind).eval()
    small = tspc.compress(reference, "svd", 0.6)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    distill(small, reference, Distillation(images=COUNT, **SHORT), context(), Progress())
    changed = [name for name, value in small.state_dict().items() if not torch.equal(value, before[name])]
    assert {name[:8] for name in changed} >= {"blocks.0", "blocks.1"}


def test_a_block_whose_answer_is_not_clear_is_refused():
    reference = KeyedClassifier(Paired).eval()
    small = tspc.compress(reference, "svd", 0.6)
    with pytest.raises(ConfigError, match=r"block blocks.0 gives dict, which is not one tensor, nor has a known name"):
        distill(small, reference, Distillation(images=COUNT, **SHORT), context(), Progress())


def test_networks_are_judged_on_texts():
    model, data = Classifier().eval(), context().required_data
    score = evaluate(model, data, CPU)
    assert score.images == COUNT
    assert judged(METRICS["cosine"], model, data, CPU, Classifier()).value == pytest.approx(1.0)


def test_the_loss_of_a_block_leaves_padding_out():
    target, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    wrong = torch.where(mask[..., None], target, target + 5)
    block = lambda x: wrong  # noqa: E731
    call: Any = ((target,), {})
    assert float(_loss(block, Masked(call, [mask]), target)) == 0.0
    assert float(_loss(block, Masked(call, []), target)) > 1.0


def test_answers_at_padded_positions_are_no_distance():
    class Tokens(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(shift))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids[..., None] + self.shift * (1 - attention_mask)[..., None]

    reference, model = Tokens(0.0), Tokens(9.0)
    keep_closer_(model, {"shift": torch.tensor(3.0)}, reference, lambda: (x for x, _ in Texts().batches(8)), context())
    assert float(model.shift.detach()) == 9.0, "both are as near as can be"
