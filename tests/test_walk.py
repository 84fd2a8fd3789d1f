"""What a walk keeps between the blocks of a network, whatever they hand each other, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.small import CPU
from tests.test_stash import Cache, Frozen, Pair, Slots
from tspc.calibration.gathering import moments_of
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.compress import compress
from tspc.compression.path_costs import input_sizes
from tspc.errors import TspcWarning
from tspc.layers.dense import has_inputs, kernel_of, kind_of
from tspc.models import NetworkSpec
from tspc.phases.distill import Distillation, distill
from tspc.phases.finetune import Finetuning, finetune
from tspc.training import Progress
from tspc.traversal.blocks import find_blocks


class Step(nn.Module):
    """A block that takes its input as it is wrapped, and changes it in place."""

    def __init__(self, wrap: Any, unwrap: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.wrap, self.unwrap = wrap, unwrap

    def forward(self, given: Any) -> Any:
        x = self.unwrap(given)
        x = x + self.second(self.first(input=x).relu_())
        return self.wrap(x)


class Steps(nn.Module):
    def __init__(self, wrap: Any, unwrap: Any) -> None:
        super().__init__()
        self.wrap, self.unwrap = wrap, unwrap
        self.blocks = nn.ModuleList(Step(wrap, unwrap) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.wrap(x)
        for number, block in enumerate(self.blocks):
            given = block(given=given) if number == 1 else block(given)
        return self.head(self.unwrap(given))


def grown(x: torch.Tensor) -> Cache:
    cache = Cache()
    cache.seen.append(x)
    return cache


def the_last(cache: Cache) -> torch.Tensor:
    cache.seen.append(torch.stack(cache.seen).sum(0))
    return cache.seen[-1]


WRAPPINGS = {
    "tensor": (lambda x: x, lambda x: x),
    "namedtuple": (Pair, lambda pair: pair.x),
    "dataclass": (Frozen, lambda value: value.x),
    "slots": (Slots, lambda value: value.x),
    "dict": (lambda x: {"x": [x, None]}, lambda value: value["x"][0]),
    "cache": (grown, the_last),
    "iterator": (lambda x: iter([x]), next),
}


def seen_by_the_whole(model: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    rows: list[torch.Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        rows.append(next(iter((*args, *kwargs.values()))).clone())

    with torch.no_grad(), model.get_submodule(name).register_forward_hook(see, with_kwargs=True):
        model(x)
    return torch.cat(rows)


@pytest.mark.parametrize("memory", [0, 64])
@pytest.mark.parametrize("kind", WRAPPINGS)
@pytest.mark.filterwarnings("ignore:blocks.* is called with a list_iterator")
def test_blocks_may_hand_each_other_what_they_like(kind, memory):
    torch.manual_seed(0)
    model, x = Steps(*WRAPPINGS[kind]).eval(), torch.randn(20, 4)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with Samples(x, Calibration(batch_size=8, patches=10**9, memory=memory)) as samples:
        trace = samples.survey(model, names).trace
        assert [segment.module for segment in trace.segments] == ["blocks.0", "blocks.1", "blocks.2", "head"]
        found = dict(moments_of(model, names, samples, trace))
    for name in names:
        assert_seen(found[name], seen_by_the_whole(model, name, x), model.get_submodule(name))


def assert_seen(found: Any, rows: torch.Tensor, layer: nn.Module) -> None:
    """Whether the moments are those of the rows."""
    assert found.count == len(rows)
    statistics = found.statistics(kernel_of(layer), False, 0.0)
    inputs = statistics.inputs[0] - statistics.damping[0] * torch.eye(rows.shape[1])
    torch.testing.assert_close(inputs.float(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_a_walk_that_cannot_keep_says_so():
    model, x = Steps(*WRAPPINGS["iterator"]).eval(), torch.randn(8, 4)
    names = ["blocks.0.first", "blocks.0.second"]
    with Samples(x) as samples:
        walk = moments_of(model, names, samples, samples.survey(model, names).trace)
        with pytest.warns(TspcWarning, match="blocks.0 is called with a list_iterator, which cannot be kept: the netw"):
            next(walk)


def test_a_block_that_only_some_batches_call():
    """The block after it follows it for two images, but not for all batches."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            if float(x.detach()[0, 0]) > 0:
                x = self.second(x)
            return self.third(x)

    torch.manual_seed(0)
    model, x, names = Sometimes().eval(), torch.randn(40, 4), ["second", "third"]
    x = x[torch.argsort(model.first(x)[:, 0], descending=True)]
    settings = Calibration(batch_size=8, patches=10**9)
    with Samples(x, settings) as samples:
        found = dict(moments_of(model, names, samples, samples.survey(model, names).trace))
    for name in names:
        rows = torch.cat([r for part in x.split(8) for r in [seen_if_any(model, name, part)] if r is not None])
        assert_seen(found[name], rows, model.get_submodule(name))
    assert found["second"].count < found["third"].count


def seen_if_any(model: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor | None:
    try:
        return seen_by_the_whole(model, name, x)
    except ValueError:  # nothing to join
        return None


def test_sizes_of_inputs_given_by_keyword():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(input=self.norm(input=self.conv(input=x)).mean((2, 3)))

    model, x = Named().eval(), torch.randn(2, 3, 9, 7)
    assert input_sizes(model, ["conv", "fc"], x) == {"conv": (9, 7), "fc": (1, 1)}
    with Samples(x) as samples:
        assert samples.survey(model, ["conv"]).trace.batch_norms == {"conv": "norm"}


def residual_1d() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(self.first(x).relu())

    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.Sequential(*(Block() for _ in range(3))), nn.Flatten(), nn.Linear(48, 2)
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2))


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (residual_1d, ["0", "1.0", "1.1", "1.2", "3"]),
        (gpt2, [f"transformer.h.{i}" for i in range(3)] + ["lm_head"]),
    ],
)
def test_blocks_are_made_of_whatever_can_be_tensorized(build, blocks):
    model = build()
    assert find_blocks(model, [name for name, module in model.named_modules() if has_inputs(module)]) == blocks


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
            self.network = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.network(input_ids=ids, decoder_input_ids=ids).logits

    return Answers().eval()


def test_a_decoder_with_caches_is_compressed_the_same_from_memory_and_from_files():
    torch.manual_seed(0)
    model, ids = encoder_decoder(), torch.randint(3, 20, (16, 6))
    small: list[nn.Module] = []
    options: dict[str, Any] = {"allocation": "uniform", "include": ["network.decoder.block.*"]}
    for memory in (0, 64):
        settings = Calibration(batch_size=8, memory=memory, sensitivity=False)
        small.append(compress(model, "svd", 0.5, calibration=ids, settings=settings, **options))
    plain = compress(model, "svd", 0.5, **options)
    with torch.no_grad():
        wanted, *answers = (network(ids) for network in (model, *small, plain))
    assert torch.equal(answers[0], answers[1])
    assert float((answers[0] - wanted).norm()) < 0.8 * float((answers[2] - wanted).norm())


def test_layers_called_by_keyword_are_calibrated_and_trained_like_others(context):
    class Named(nn.Module):
        def __init__(self, by_keyword: bool) -> None:
            super().__init__()
            self.by_keyword = by_keyword
            self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.stem, self.conv, self.norm):
                x = layer(input=x) if self.by_keyword else layer(x)
            x = x.relu().mean((2, 3))
            return self.head(self.fc(input=x) if self.by_keyword else self.fc(x))

    images = next(context.data.calibration_batches(64, 64, CPU))
    found = []
    for by_keyword in (False, True):
        torch.manual_seed(0)
        reference = Named(by_keyword).eval()
        small = compress(reference, "svd", 0.5, calibration=images, settings=Calibration(batch_size=16))
        distill(small, reference, Distillation(1, 25, 1e-3, images=100, steps=3, held_out=0), context, Progress())
        finetune(small, reference, Finetuning(1, 50, 1e-3, steps=2, held_out=0), context, Progress(), "finetune")
        found.append(small.state_dict())
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5)


def test_a_gate_of_channels_makes_no_block():
    """Its 1-d convolution can be tensorized, but residual blocks stay what they were."""
    with torch.device("meta"):
        model = NetworkSpec("timm", "ecaresnet26t", 10).build()
    layers = [name for name, module in model.named_modules() if kind_of(module)]
    assert any(kind_of(module) == "conv1d" for module in model.modules())
    stages = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert [name for name in find_blocks(model, layers) if name.startswith("layer")] == stages
