"""Recurrent modules with their matrices as layers: the same answers and gradients, plans, files, exports."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tspc
from tspc.calibration.samples import Calibration
from tspc.deploy import Exporter
from tspc.layers.forms import tensorized_layers
from tspc.layers.recurrent import GRU, LSTM, Recurrent
from tspc.layers.unpacking import unpacked

X = torch.randn(48, 9, 12, generator=torch.Generator().manual_seed(0))
SETTINGS = Calibration(samples=48, batch_size=16)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 20, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(40, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0].transpose(0, 1))[0].mean(0))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def small(**options: Any) -> nn.Module:
    given = {"rate": 0.5, "calibration": X, "settings": SETTINGS} | options
    return tspc.compress(network(), "svd", **given).eval()


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [x for item in value for x in flat(item)]


def kinds() -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """Modules of all kinds, with inputs: sequences, packed ones, one without a batch; with and without a state."""
    makers: list[Any] = [nn.LSTM, nn.GRU, nn.RNN, lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)]
    bools = (True, False)
    for make, first, bias, two, layers in itertools.product(makers, bools, bools, bools, (1, 2)):
        options: dict[str, Any] = {"batch_first": first, "bias": bias, "bidirectional": two, "num_layers": layers}
        if make is nn.LSTM and not bias:
            options["proj_size"] = 3
        module = make(4, 5, **options).eval()
        batch = torch.randn((3, 6, 4) if first else (6, 3, 4))
        packed = pack_padded_sequence(batch, [2, 6, 4], batch_first=first, enforce_sorted=False)
        for x, sizes in ((batch, (3,)), (packed, (3,)), (torch.randn(6, 4), ())):
            states = [torch.randn(layers * (1 + two), *sizes, options.get("proj_size", 5))]
            if isinstance(module, nn.LSTM):
                states.append(torch.randn(layers * (1 + two), *sizes, 5))
            yield module, (x, tuple(states) if isinstance(module, nn.LSTM) else states[0]) if first else (x,)


def gradients(answer: Any, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    total = sum((x * torch.arange(x.numel()).view_as(x).cos()).sum() for x in flat(answer))
    return torch.autograd.grad(total, parameters)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_answers_and_gradients_are_those_of_pytorch_also_when_the_layers_are_watched():
    torch.manual_seed(0)
    for module, given in kinds():
        owner, names = nn.ModuleList([module]), [name for name, _ in module.named_parameters()]
        wanted = module(*given)
        slopes = gradients(wanted, list(module.parameters()))
        with unpacked(owner):
            module, seen = owner[0], []
            assert isinstance(module, Recurrent)
            with torch.no_grad():
                answers = [module(*given), module(*given)]
            hook = lambda layer, inputs, output: seen.append((layer, inputs[0].shape[:-1], output.shape[:-1]))  # noqa: E731, B023
            handles = [part.register_forward_hook(hook) for part in module.children()]
            with torch.no_grad():
                answers.append(module(*given))
            assert [layer for layer, *_ in seen] == list(module.children())
            watched = module(*given)
            found = gradients(watched, [getattr(module, name) for name in names])
            for handle in handles:
                handle.remove()
        for answer in (*answers, watched):
            assert type(answer[0]) is type(wanted[0])
            torch.testing.assert_close(flat(answer), flat(wanted))
        torch.testing.assert_close(found, slopes)


def test_a_plan_has_all_matrices_and_a_compressed_network_is_near():
    model, names = (
        network(),
        [f"lstm.{kind}_l{n}{way}" for n in "01" for way in ("", "_reverse") for kind in ("ih", "hh")],
    )
    made = tspc.plan(model, "svd", 0.5, calibration=X, settings=SETTINGS)
    assert type(model.lstm) is nn.LSTM
    assert [row.name for row in made.layers] == [*names, "gru.ih_l0", "gru.hh_l0", "head"]
    assert [row.reason for row in made.layers if row.reason] == ["final layer"]
    assert {row.path for row in made.tensorized} == {"rebuilt"}
    result = small()
    with torch.no_grad():
        wanted, found, blind = model(X), result(X), small(calibration=None)(X)
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert (found - wanted).norm() < 0.5 * (blind - wanted).norm()
    assert isinstance(result.lstm, LSTM)
    assert isinstance(result.gru, GRU)


@torch.no_grad()
def test_save_load_copies_and_bits(tmp_path):
    for options in ({}, {"bits": 8}):
        made = small(**options)
        tspc.save(made, tmp_path / "small.safetensors")
        loaded = tspc.load(tmp_path / "small.safetensors", network())
        assert torch.equal(loaded(X), made(X))
        assert torch.equal(copy.deepcopy(made)(X), made(X))
        torch.testing.assert_close(made.double()(X.double()).float(), loaded(X), rtol=1e-4, atol=1e-4)


def test_kept_matrices_follow_the_factors():
    made = small()
    with torch.no_grad():
        before = made(X)
        name, layer = next((n, x) for n, x in tensorized_layers(made).items() if n.startswith("gru.hh"))
        layer.factor_parameters()[0].mul_(2)
        assert not torch.allclose(made(X), before)
        assert torch.equal(made.gru.weight_hh_l0, layer.weight)
        assert name == "gru.hh_l0"
    made.train()
    made(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_what_is_left_out_stays_pytorchs_own_with_its_parameters():
    model, made = network(), small(exclude=["lstm*"], rate=0.6)
    assert type(made.lstm) is nn.LSTM
    assert torch.equal(made.lstm.weight_ih_l0, model.lstm.weight_ih_l0)
    tspc.apply_(model, tspc.plan(model, "svd", 0.5, include=["gru*"]))
    assert type(model.lstm) is nn.LSTM
    assert isinstance(model.gru, GRU)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.gru.parameters())


@pytest.mark.slow
def test_export(tmp_path):
    # Every step of a sequence is in the graph, so that few are enough; the network is traced once.
    exporter = Exporter(small(), X[:3, :3], 1e-4)
    for format in ("onnx", "pt2"):
        assert exporter.write(tmp_path / f"a.{format}", format).relative < 1e-5


def test_folding_gives_plain_modules():
    made = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = tspc.fold_batch_norms(made, X[:2])
    assert not tensorized_layers(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(X), made(X))
