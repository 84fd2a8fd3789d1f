"""A grammar of small random networks, for property tests.

    network := input, exchange, block+, head, answer, dtype, extra*, wrapper
    block   := unit+, container, with or without a skip connection
    unit    := layer, what is done to its weight, how it is used, norm, activation

Everything drawn is plain data, whose `repr` builds the same network again: `Network(...).build()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import random_parts as parts
from tests.random_layers import WEIGHTS, layer_of, norm_of, shape_after, spread_
from tests.random_parts import EXCHANGES, EXTRAS, Block, Cache, Unit

OFF: frozenset[str] = frozenset()
"""Kinds with a known fault, which are not drawn; the aim is none."""

INPUTS = {
    "maps": (3, 8, 7),
    "narrow maps": (1, 5, 9),
    "series": (4, 11),
    "volumes": (2, 4, 5, 3),
    "rows": (5, 6),
    "vectors": (7,),
    "tokens": (6,),
}
"""Kind of input → shape of one example."""
CONVOLUTIONS = ("plain", "pointwise", "unpadded", "strided", "dilated", "grouped", "depthwise", "transposed")
LAYERS = {
    "maps": (*CONVOLUTIONS, "oblong", "reflecting", "channels last", "own convolution"),
    "series": (*CONVOLUTIONS, "circular", "channels last"),
    "volumes": ("channels last", "volume"),
    "rows": ("linear", "matrix", "attention", "recurrent", "encoder", "experts", "own linear"),
    "vectors": ("linear", "matrix", "experts", "own linear"),
}
NORMS = {
    "maps": ("no norm", "batch", "batch without affine", "batch of the moment", "group", "instance"),
    "series": ("no norm", "batch", "batch without affine", "batch of the moment", "group", "instance"),
    "volumes": ("no norm", "batch", "group"),
    "rows": ("no norm", "batch of channels", "layer"),
    "vectors": ("no norm", "batch", "batch without affine", "group", "layer"),
}
ACTIVATIONS = ("no activation", "relu", "relu in place", "added in place", "gelu", "tanh", "detached")
USES = (
    "once", "twice", "keyword", "checkpoint", "own weight", "attributes", "viewed", "never called", "frozen",
    "frozen weight", "hook", "pre-hook",
)  # fmt: skip
SHARED = ("two names", "tied weight")
"""Uses that keep a layer dense."""
CONTAINERS = ("sequential", "list", "dict", "nested")
HEADS = ("linear", "no head", "tied")
ANSWERS = ("tensor", "tuple", "dict", "dataclass")
DTYPES = ("float32", "float64", "bfloat16")
WRAPPERS = ("no wrapper", "prefix", "data parallel")
WORDS, CLASSES = 13, 5


@dataclass(frozen=True)
class UnitOf:
    layer: str
    width: int
    kernel: int
    bias: bool
    weight: str
    use: str
    norm: str
    activation: str

    def build(self, form: str, shape: Sequence[int]) -> nn.Module:
        layer = layer_of(self.layer, form, shape, self.width, self.kernel, self.bias)
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer = WEIGHTS[self.weight](layer)
        norm = norm_of(self.norm, form, shape_after(layer, shape))
        return Unit(layer, norm, self.activation, self.use)


@dataclass(frozen=True)
class BlockOf:
    units: tuple[UnitOf, ...]
    container: str
    residual: bool


@dataclass(frozen=True)
class Network:
    input: str
    exchange: str
    blocks: tuple[BlockOf, ...]
    head: str
    answer: str
    dtype: str
    extras: tuple[str, ...]
    wrapper: str
    seed: int

    @property
    def form(self) -> str:
        return {"narrow maps": "maps", "tokens": "rows"}.get(self.input, self.input)

    def build(self) -> nn.Module:
        """The network, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = Made(self)
        if self.wrapper != "no wrapper":
            model = nn.DataParallel(model) if self.wrapper == "data parallel" else nn.Sequential(model)
        return model.eval()

    def inputs(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, *INPUTS[self.input])
        if self.input == "tokens":
            return torch.randint(WORDS, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(getattr(torch, self.dtype))


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Made(nn.Module):
    """The network that a description stands for."""

    def __init__(self, given: Network) -> None:
        super().__init__()
        self.exchange, self.answer, self.form = given.exchange, given.answer, given.form
        self.embedding = nn.Embedding(WORDS, 6) if given.input == "tokens" else None
        shape: tuple[int, ...] = (*INPUTS[given.input], *([6] if given.input == "tokens" else []))
        self.blocks = nn.ModuleList()
        for block in given.blocks:
            units, start = [], shape
            for unit in block.units:
                units.append(unit.build(self.form, shape))
                shape = shape_after(units[-1], shape)
            self.blocks.append(Block(units, block.container, block.residual and start == shape, given.exchange))
        width = shape[-1] if self.form == "rows" else shape[0]
        self.head = None if given.head == "no head" else nn.Linear(width, CLASSES)
        if given.head == "tied" and self.embedding is not None and width == 6:
            self.head = nn.Linear(width, WORDS)
            self.head.weight = self.embedding.weight
        self.to(getattr(torch, given.dtype))
        spread_(self)
        for extra in given.extras:
            parts.add_extra(self, extra)

    def forward(self, input: Tensor) -> Any:
        x = input if self.embedding is None else self.embedding(input)
        total, cache = torch.zeros(()), Cache()
        for block in self.blocks:
            args, named = parts.arguments(self.exchange, x, total, cache)
            x, total = parts.unpacked(block(*args, **named), total)
        if hasattr(self, "keeps"):
            self.last = x
        features = x
        if self.head is not None:
            x = self.head(x.mean(list(range(2, x.ndim))) if self.form in ("maps", "series", "volumes") else x)
        made = {"tuple": (x, features), "dict": {"logits": x, "features": features}, "dataclass": Answer(x, features)}
        return made.get(self.answer, x)


def kinds(of: Sequence[str]) -> st.SearchStrategy[str]:
    """One of the kinds, the first one most simple, without those that are off."""
    return st.sampled_from([kind for kind in of if kind not in OFF])


def mostly(of: Sequence[str]) -> st.SearchStrategy[str]:
    """The first kind half of the time: what is unusual about a network is one thing or two, not everything."""
    return st.one_of(st.just(of[0]), kinds(of))


def units(form: str, usual: bool = False) -> st.SearchStrategy[UnitOf]:
    """A unit; a `usual` one has a layer that can be tensorized."""
    return st.builds(
        UnitOf,
        layer=kinds(LAYERS[form][: (1 if form == "volumes" else 2) if usual else None]),
        width=st.sampled_from((8, 6, 12, 7, 16, 1)[: 3 if usual else None]),
        kernel=st.sampled_from((3, 2, 1, 5)),
        bias=st.booleans(),
        weight=st.just("as it is") if usual else mostly(tuple(WEIGHTS)),
        use=mostly(USES if usual else (*USES, *SHARED)),
        norm=kinds(NORMS[form]),
        activation=kinds(ACTIVATIONS),
    )


def blocks(form: str) -> st.SearchStrategy[BlockOf]:
    inside = st.tuples(units(form, usual=True), st.lists(units(form), max_size=2)).map(
        lambda drawn: (drawn[0], *drawn[1])
    )
    return st.builds(BlockOf, inside, kinds(CONTAINERS), st.booleans())


@st.composite
def networks(draw: st.DrawFn) -> Network:
    given = draw(kinds(tuple(INPUTS)))
    form = Network(given, "", (), "", "", "", (), "", 0).form
    return Network(
        input=given,
        exchange=draw(mostly(EXCHANGES)),
        blocks=tuple(draw(st.lists(blocks(form), min_size=1, max_size=2))),
        head=draw(kinds(HEADS)),
        answer=draw(mostly(ANSWERS)),
        dtype=draw(mostly(DTYPES)),
        extras=tuple(draw(st.lists(kinds(EXTRAS), max_size=1))),
        wrapper=draw(mostly(WRAPPERS)),
        seed=draw(st.integers(0, 9)),
    )
