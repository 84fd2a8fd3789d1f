"""Tables of embeddings in few bits: plans, sizes, files, export, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tspc
from tspc.calibration.samples import Calibration, Samples
from tspc.calibration.tables import tables_of
from tspc.compression.apply import tensorized
from tspc.compression.integers import state_bytes
from tspc.compression.planning import plan
from tspc.deploy import Exporter
from tspc.deploy.folding import plain
from tspc.errors import WeightsError
from tspc.layers.forms import Table, tensorized_layers
from tspc.models.safe_files import read_tensors, write_tensors
from tspc.quantization.factors import nearest

TOKENS, WIDTH = 150, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = self.q(h) @ self.k(h).mT / WIDTH**0.5
        return x + self.out(scores.softmax(-1) @ self.v(h))


class Encoder(nn.Module):
    """A small transformer, with tokens that come often and others that never come."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(TOKENS, WIDTH, padding_idx=0), nn.Embedding(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def encoder(dtype: torch.dtype = torch.float32) -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval().to(dtype)


def texts(count: int = 64) -> Tensor:
    """Token numbers (count × 12)."""
    return (torch.rand(count, 12, generator=torch.Generator().manual_seed(1)) ** 3 * 100).long()


def tables(model: nn.Module) -> dict[str, Table]:
    return {name: layer for name, layer in tensorized_layers(model).items() if isinstance(layer, Table)}


@pytest.mark.parametrize(("method", "size"), [("svd", 0.14), ("dense", 0.18)])
def test_a_size_counts_tables_and_is_met(tmp_path, method, size):
    model, ids = encoder(), texts()
    made = plan(model, method, size=size, calibration=ids)
    small = tspc.compress(model, method, size=size, calibration=ids).eval()
    assert set(tables(small)) == {"words", "places"}
    assert made.network_bytes == state_bytes(small) <= size * state_bytes(model)
    rows = {row.name: row for row in made.layers if row.is_table}
    assert all(
        row.ranks == "dense: the budget allows it" and row.bits < 32 and row.output_error < 0.2 for row in rows.values()
    )
    tspc.save(small, tmp_path / "small.safetensors")
    loaded = tspc.load(tmp_path / "small.safetensors", encoder()).eval()
    assert torch.equal(loaded(ids), small(ids))
    assert (tmp_path / "small.safetensors").stat().st_size < state_bytes(small) + 10_000


@pytest.mark.parametrize("bits", [16, 8, 3])
@pytest.mark.parametrize("calibrated", [False, True])
def test_all_tables_have_the_width_that_was_asked_for(bits, calibrated):
    ids = texts()
    given = ids if calibrated else None
    for options in ({"method": "svd", "rate": 0.6}, {"method": "dense"}):
        small = tspc.compress(encoder(), bits=bits, calibration=given, **options)
        assert {name: table.bits for name, table in tables(small).items()} == {"words": bits, "places": bits}


def test_a_budget_of_parameters_leaves_tables_alone():
    model = encoder()
    made = plan(model, "svd", 0.5, calibration=texts())
    assert not any(row.is_table for row in made.layers)
    assert not tables(tspc.compress(model, "svd", 0.5, calibration=texts()))
    narrow = plan(model, "svd", 0.5, bits=8, calibration=texts())
    assert narrow.params == made.params
    assert [row.rank or () for row in narrow.budgeted] == [row.rank or () for row in made.budgeted]


def test_a_call_rounds_the_rows_that_it_looks_up_and_keeps_no_table():
    model = encoder()
    small = tspc.compress(model, "dense", bits=4).eval()
    table = tables(small)["words"]
    ids = texts(3)
    assert torch.equal(table(ids), table.weight[ids])
    with torch.no_grad():
        assert torch.equal(small.eval().words(ids), table.weight[ids])
    assert [kept.shape for kept in table.kept] == [(TOKENS,)]
    assert torch.equal(table(ids.int()), table(ids))
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (TOKENS, WIDTH, 0)
    ordinary = plain(table)
    assert type(ordinary) is nn.Embedding
    assert torch.equal(ordinary(ids), table(ids))
    values = table(ids)
    table.take_off_grids_()
    assert table.bits == 32
    assert torch.equal(table(ids), values)


@pytest.mark.parametrize("bits", [6, 3])
def test_the_error_of_the_outputs_is_at_most_that_of_rounding_to_nearest(bits):
    model, ids = encoder(), texts()
    with Samples(ids, Calibration(samples=64)) as samples:
        survey = samples.survey(model, ["head"], ["words", "places"])
        norms = {name: sketch.metric for name, sketch in tables_of(model, ["words", "places"], samples, survey)}
    small = tspc.compress(model, "dense", bits=bits, calibration=ids)
    for name, table in tables(small).items():
        kernel = model.get_submodule(name).weight.detach()
        plain_factors = nearest(table.factors().__class__((kernel,), table.shape, ()), bits).factors
        ours, theirs = (
            norms[name].squared(kernel - other.detach()) for other in (table.weight, *plain_factors.tensors)
        )
        assert 0 < ours <= theirs * (1 + 1e-6)
    assert ours < 0.95 * theirs


def test_frequent_tokens_count_more_and_none_is_without_weight():
    model, ids = encoder(), texts()
    with Samples(ids, Calibration(samples=64, sensitivity=False)) as samples:
        survey = samples.survey(model, ["head"])
        ((_, sketch),) = tables_of(model, ["words"], samples, survey)
    shares, counts = sketch.metric.outputs, torch.bincount(ids.flatten(), minlength=TOKENS) + 1
    torch.testing.assert_close(shares, counts / counts.sum())
    assert torch.equal(sketch.metric.inputs, torch.eye(WIDTH))


def test_what_is_no_plain_table_stays_as_it_is():
    model = encoder()
    model.tied = nn.Module()
    model.tied.weight = model.words.weight
    model.tight, model.thin = nn.Embedding(9, 16, max_norm=1.0), nn.Embedding(500, 4)
    model.sparse = nn.Embedding(9, 16, sparse=True)
    model.own = type("Own", (nn.Embedding,), {})(9, 16)
    small = tspc.compress(model, "dense", bits=8)
    assert set(tables(small)) == {"places"}
    assert small.tied.weight is small.words.weight
    reasons = {row.name: row.reason for row in plan(model, "svd", size=0.7).layers if row.is_table}
    assert reasons == {
        "words": "its weight is shared with tied",
        "places": None,
        "tight": "max_norm changes its rows when it is called",
        "thin": "rows of fewer than 8 numbers",
        "sparse": "its gradients are sparse",
        "own": "Own is not supported",
    }
    left = tspc.compress(encoder(), "dense", bits=8, exclude=["words"])
    assert set(tables(left)) == {"places"}
    assert plan(encoder(), "svd", 0.5, exclude=["words"]).rate == 0.5


def test_export(tmp_path):
    small = tspc.compress(encoder(), "svd", size=0.2).eval()
    exporter = Exporter(small, texts(4), 1e-4)  # it traces the network once
    for format in ("onnx", "pt2"):
        assert exporter.write(tmp_path / f"small.{format}", format).relative < 1e-5
    program = torch.export.export(small, (texts(4),))
    assert torch.equal(program.module()(texts(4)), small(texts(4)))


def test_training_goes_on():
    ids = texts()
    small = tspc.compress(encoder(), "dense", bits=3).train()
    wanted = torch.randn(64, 10, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = (small(ids) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    table = tables(small)["words"]
    assert table.factor_parameters()[0].grad[0].abs().max() == 0, "the padding learns nothing"
    steps = table.weight / table.grids[0].scales[:, None]
    torch.testing.assert_close(steps, steps.round())
    trained = small(ids)
    torch.testing.assert_close(small.eval()(ids), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats(tmp_path, dtype):
    small = tspc.compress(encoder(dtype), "dense", bits=4).eval()
    tspc.save(small, tmp_path / "small.safetensors")
    loaded = tspc.load(tmp_path / "small.safetensors", encoder())
    assert loaded.words.weight.dtype == dtype
    assert torch.equal(loaded(texts()), small(texts()))


def test_a_network_of_a_table_and_its_last_layer():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(16 * 12, 4)).eval()
    small = tspc.compress(model, "svd", size=0.23, calibration=texts() % 50)
    assert small[0].bits < 8
    assert state_bytes(small) <= 0.23 * state_bytes(model)


def test_a_file_that_gives_a_table_ranks_is_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    tspc.save(tspc.compress(encoder(), "dense", bits=8), path)
    file = read_tensors(path)
    header = str(file.header).replace(
        '"method": 0, "shape": [150, 32], "rank": []',
        '"method": {"name": "svd"}, "shape": [150, 32], "rank": [2]',
    )
    assert header != file.header
    write_tensors(path, dict(file.tensors), header)
    with pytest.raises(
        WeightsError, match="the integers of layer words are missing, damaged, or not those of its rank"
    ):
        tspc.load(path, encoder())
    tspc.save(tspc.compress(encoder(), "dense", bits=8), path)
    other = encoder()
    other.words = nn.Embedding(90, WIDTH)
    with pytest.raises(WeightsError, match=r"words was a kernel of shape \[150, 32\]"):
        tspc.load(path, other)


@pytest.mark.parametrize("size", [0.24, 0.18])
def test_the_plan_expects_about_the_error_that_comes(size):
    ids = texts()
    with Samples(ids, Calibration(samples=64)) as samples:
        made = plan(encoder(), "dense", size=size, calibration=samples)
        _, done = tensorized(encoder(), made, samples)
    rows = zip(made.layers, done.layers, strict=True)
    errors = [(row.output_error, fitted.output_error) for row, fitted in rows if row.is_table]
    assert len(errors) == 2
    assert all(0.8 < expected / found < 1.25 for expected, found in errors)


def test_a_single_token_gives_a_single_row():
    model = tspc.compress(nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 32), nn.Linear(32, 32)), "svd", size=0.35)
    assert torch.equal(model(torch.tensor(5)), model(torch.tensor([5]))[0])
