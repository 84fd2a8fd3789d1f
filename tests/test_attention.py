"""PyTorch's attention as four dense layers: the same answers for all arguments, plans, files, encoder layers."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tspc
from tspc.calibration.samples import Calibration
from tspc.deploy import Exporter
from tspc.errors import WeightsError
from tspc.layers.attention import Attention
from tspc.layers.forms import tensorized_layers
from tspc.layers.unpacking import unpacked

X = torch.randn(48, 7, 12, generator=torch.Generator().manual_seed(0))
SETTINGS = Calibration(samples=48, batch_size=16)
PARTS = ["k_proj", "out_proj", "q_proj", "v_proj"]


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.inputs = nn.Linear(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 40, batch_first=batch_first, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.inputs(x), src_key_padding_mask=padding))


def encoder(**options: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(**options).eval()


def small(**options: Any) -> nn.Module:
    given = {"rate": 0.5, "calibration": X, "settings": SETTINGS} | options
    return tspc.compress(encoder(), "svd", **given).eval()


def arguments(batched: bool, batch_first: bool, mask: str, padded: bool, sizes: tuple[int, int]) -> dict[str, Any]:
    """Query, key, value and masks of 3 sequences with 5 queries and 5 keys."""
    sizes_of = lambda width: (3, 5, width) if batch_first else (5, 3, width)  # noqa: E731
    q, k, v = (torch.randn(sizes_of(width) if batched else (5, width)) for width in (8, *sizes))
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "key_padding_mask": None, "attn_mask": None}
    if padded:
        padding = torch.arange(5) >= 3
        padding = torch.zeros(5).masked_fill(padding, -1e9) if mask == "numbers" else padding
        given["key_padding_mask"] = padding.expand(3, 5) if batched else padding
    if mask == "causal":
        given["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if mask == "numbers":
        given["attn_mask"] = torch.randn((3 if batched else 1) * 2, 5, 5)
    return given


def modules(seed: int = 0) -> list[tuple[nn.Module, bool, tuple[int, int]]]:
    """Attention of all kinds, with whether it has the batch first, and the widths of its keys and values."""
    found = []
    for first, bias, extra, sizes in itertools.product((True, False), (True, False), (True, False), ((8, 8), (6, 10))):
        torch.manual_seed(seed)
        options = {"bias": bias, "add_bias_kv": extra, "add_zero_attn": not extra, "batch_first": first}
        module = nn.MultiheadAttention(8, 2, kdim=sizes[0], vdim=sizes[1], **options)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        found.append((nn.ModuleList([module.eval()]), first, sizes))
    return found


@torch.no_grad()
def test_all_arguments_give_the_answers_of_pytorch():
    """A choice of the uses, because there are thousands."""
    uses = itertools.product((True, False), ("", "causal", "numbers"), (True, False), (True, False), (True, False))
    some = random.Random(0)
    chosen = list(uses)
    for owner, first, sizes in modules():
        for batched, mask, padded, weights, average in some.sample(chosen, 8):
            given = arguments(batched, first, mask, padded, sizes)
            given |= {"need_weights": weights, "average_attn_weights": average, "is_causal": mask == "causal"}
            wanted = owner[0](**given)
            with unpacked(owner):
                assert isinstance(owner[0], Attention)
                found = owner[0](**given)
                assert sorted(name for name, _ in owner[0].named_children()) == PARTS
            assert type(owner[0]) is nn.MultiheadAttention
            torch.testing.assert_close(found[0], wanted[0])
            assert found[0].is_contiguous()
            assert (found[1] is None) == (wanted[1] is None)
            if weights:
                torch.testing.assert_close(found[1], wanted[1])


def test_dropout_and_the_causal_hint_without_a_mask():
    owner = nn.ModuleList([nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)])
    q = torch.randn(2, 4, 8)
    with unpacked(owner):
        torch.manual_seed(0)
        one, two = (owner[0](q, q, q, need_weights=False)[0] for _ in range(2))
        assert not torch.equal(one, two)
        with pytest.raises(RuntimeError, match="is_causal"):
            owner[0](q, q, q, is_causal=True)


def test_gradients_and_the_rebuilt_matrices():
    owner, q = modules()[0][0].double(), torch.randn(2, 4, 8, dtype=torch.float64)
    dense, wanted = owner[0], {name: p.detach().clone() for name, p in owner[0].named_parameters()}
    dense(q, q, q)[0].square().sum().backward()
    gradient = dense.in_proj_weight.grad
    with unpacked(owner):
        for name in ("in_proj_weight", "in_proj_bias"):
            assert torch.equal(getattr(owner[0], name), wanted[name])
        owner[0](q, q, q)[0].square().sum().backward()
        found = [owner[0].get_submodule(name).weight.grad for name in ("q_proj", "k_proj", "v_proj")]
        torch.testing.assert_close(torch.cat(found), gradient)


def test_a_plan_changes_nothing_and_a_compressed_network_has_the_layers():
    model = encoder()
    before = {name: (module, type(module)) for name, module in model.named_modules()}
    made = tspc.plan(model, "svd", 0.5, calibration=X, settings=SETTINGS)
    assert {name: (module, type(module)) for name, module in model.named_modules()} == before
    assert model.encoder.use_nested_tensor
    names = {f"encoder.layers.{i}.self_attn.{part}" for i in range(2) for part in PARTS}
    assert names <= {row.name for row in made.budgeted}
    expected, made = made.network_params, small()
    assert names & set(tensorized_layers(made))
    assert sum(p.numel() for p in made.parameters()) == expected


def test_its_answers_are_nearer_than_with_the_encoders_other_layers_alone():
    """At the same size of the network."""
    model, names = encoder(), ["encoder.*.linear?"]
    whole = small(rate=0.7, rate_scope="network")
    others = small(rate=0.7, rate_scope="network", include=names)
    with torch.no_grad():
        wanted, one, two = model(X), whole(X), others(X)
    assert (one - wanted).norm() < 0.8 * (two - wanted).norm()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_padding_and_the_fast_path_of_encoder_layers():
    model, made, padding = encoder(), small(rate=0.9), torch.zeros(48, 7, dtype=torch.bool)
    padding[::2, 5:] = True
    assert not made.encoder.use_nested_tensor
    wanted, found = model(X, padding), made(X, padding)
    there = ~padding
    assert (found - wanted)[there].norm() < 0.1 * wanted[there].norm()
    # Nothing that is behind the padding counts.
    other = X.clone()
    other[padding] = 9.0
    torch.testing.assert_close(made(other, padding)[there], found[there])
    assert not torch.allclose(made(X)[there], found[there])


@pytest.mark.parametrize("bits", [32, 8])
@torch.no_grad()
def test_save_and_load(tmp_path, bits):
    made = small(bits=bits)
    tspc.save(made, tmp_path / "small.safetensors")
    with torch.device("meta"):
        empty = Encoder().eval()
    for dense in (encoder(), empty) if bits == 32 else (encoder(),):
        loaded = tspc.load(tmp_path / "small.safetensors", dense)
        assert torch.equal(loaded(X), made(X))
        assert isinstance(loaded.encoder.layers[0].self_attn, Attention)
    wrong = Encoder()
    wrong.inputs = nn.Linear(12, 16)
    with pytest.raises(WeightsError):
        tspc.load(tmp_path / "small.safetensors", wrong)
    assert type(wrong.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert torch.equal(copy.deepcopy(made)(X), made(X))


def test_what_is_left_out_stays_pytorchs_own():
    for options in ({"exclude": ["*.self_attn*"]}, {"min_params": 1100}):
        made = small(**options)
        assert type(made.encoder.layers[0].self_attn) is nn.MultiheadAttention
        assert made.encoder.use_nested_tensor
    asked: list[str] = []
    small(filter_fn=lambda name, module: asked.append(name) is None and "q_proj" in name)
    assert "encoder.layers.0.self_attn.k_proj" in asked


def test_shared_and_changed_attention_stays_as_it_is():
    one = encoder()
    one.encoder.layers[1].self_attn = one.encoder.layers[0].self_attn
    made = tspc.compress(one, "svd", 0.5)
    assert type(made.encoder.layers[0].self_attn) is nn.MultiheadAttention
    other = encoder()
    nn.utils.parametrizations.weight_norm(other.encoder.layers[0].self_attn, "in_proj_weight")
    made = tspc.compress(other, "svd", 0.5)
    assert isinstance(made.encoder.layers[1].self_attn, Attention)
    assert not isinstance(made.encoder.layers[0].self_attn, Attention)


def test_hooks_move_along_and_their_handles_work():
    model, seen = encoder(), []
    handle = model.encoder.layers[0].self_attn.register_forward_hook(lambda *given: seen.append(len(given)))
    tspc.apply_(model, tspc.plan(model, "svd", 0.3))
    assert isinstance(model.encoder.layers[0].self_attn, Attention)
    model(X[:2])
    handle.remove()
    model(X[:2])
    assert seen == [3]


def test_sequences_first_and_training():
    torch.manual_seed(0)
    made = tspc.compress(encoder(batch_first=False), "svd", 0.5, calibration=X, settings=SETTINGS).train()
    made(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.slow
def test_export(tmp_path):
    made = tspc.compress(encoder(layers=1), "svd", 0.5, calibration=X, settings=SETTINGS).eval()
    assert isinstance(made.encoder.layers[0].self_attn, Attention)
    exporter = Exporter(made, X[:3], 1e-4)  # it traces the network once
    for format in ("onnx", "pt2"):
        assert exporter.write(tmp_path / f"a.{format}", format).relative < 1e-5
