"""Every parameter of a network is in its plan, once; what stays dense says why, and an error names what holds it up."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import tspc
from tspc.compression.beside_rows import Beside, lines
from tspc.compression.plan import Plan
from tspc.errors import InfeasibleRateError
from tspc.models import NetworkSpec
from tspc.store.schemas import PLAN, problem
from tspc.terminal.tables import plan_table


class OwnLSTM(nn.LSTM): ...


class Odd(nn.Module):
    """Something of everything that is no convolution and no dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.embedding = nn.Embedding(40, 32)
        self.memory = nn.LSTM(32, 32, batch_first=True)
        self.cell = nn.LSTMCell(8, 8)
        self.pair = nn.Bilinear(32, 32, 4)
        self.normed = weight_norm(nn.Linear(32, 32))
        self.slope = nn.PReLU(32)
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32), nn.GroupNorm(2, 32)])
        self.several = nn.ParameterList([torch.zeros(2, 3), torch.zeros(5)])
        self.wide = nn.Linear(32, 64)
        self.narrow = nn.Linear(64, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.embedding(x) + self.token)
        return self.head(self.norms[1](self.narrow(self.slope(self.wide(self.memory(y)[0]).mT[..., :32].mT))))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=900, max_position_embeddings=40, **sizes)
    return transformers.BertForMaskedLM(config)  # its output head has the weight of its embeddings


NETWORKS = {
    "resnet": lambda: NetworkSpec("builtin", "resnet20", 10).build(),
    "bert": bert,
    "odd": Odd,
}


def total(plan: Plan) -> int:
    return sum(layer.dense_params for layer in plan.layers) + sum(row.params for row in plan.beside)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_rows_together_are_the_network(name):
    model = NETWORKS[name]()
    for given in ({"rate": 0.5}, {"rate": 0.5, "bits": 8}, {"size": "0.9"}):
        made = tspc.plan(model, "svd", **given)
        assert total(made) == made.network_dense_params == sum(p.numel() for p in model.parameters())
        rows = [row.name for row in (*made.layers, *made.beside)]
        assert len(rows) == len(set(rows))
        for name, _ in model.named_parameters():
            owner = name.rpartition(".")[0]
            assert any(row in (name, owner) or f"{row}.".startswith(f"{owner}.") for row in rows), name
        again = Plan.from_dict(made.to_dict())
        assert again == made
        assert problem(made.to_dict(), PLAN) is None
        old = {key: value for key, value in made.to_dict().items() if key != "beside"}
        assert Plan.from_dict(old).beside == ()  # of an earlier version


def test_reasons():
    reasons = {row.name: (row.kind, row.reason) for row in tspc.plan(Odd(), "svd", 0.5).beside}
    own = ("Parameter", "a parameter of its own, not a layer's weight")
    assert reasons == {
        "token": own,
        "embedding": ("Embedding", "a table, which has no ranks"),
        "cell": ("LSTMCell", "LSTMCell is not supported"),
        "pair": ("Bilinear", "it multiplies two inputs, so its weight is no matrix"),
        "normed.parametrizations.weight": ("ParametrizationList", "normed.weight is computed from it"),
        "slope": ("PReLU", "the slopes of an activation"),
        "norms.0": ("LayerNorm", "normalisation"),
        "norms.1": ("LayerNorm", "normalisation"),
        "norms.2": ("GroupNorm", "normalisation"),
        "several.0": own,
        "several.1": own,
    }
    rows = {row.name: row for row in tspc.plan(Odd(), "svd", 0.5).layers}
    assert rows["head"].reason == "its weight is shared with embedding"
    assert rows["head"].dense_params == 0, "counted in the embedding"


def test_tables_for_people_group_what_is_alike():
    made = tspc.plan(NETWORKS["resnet"](), "svd", 0.5)
    (line,) = lines(made.beside)
    assert str(line) == "19 normalisation layers: dense: normalisation, 1,376 parameters"
    assert str(line) in str(made)
    console = Console(width=140)
    with console.capture() as shown:
        console.print(plan_table(made, 1, 1))
    assert "19 normalisation layers" in shown.get()
    tokens = [Beside(f"token{i}", "Parameter", (3,), 3, "a parameter of its own", 12) for i in range(5)]
    assert [one.name for one in lines(tokens[:3])] == ["token0", "token1", "token2"]
    (several,) = lines(tokens)
    assert (several.params, several.bytes) == (15, 60)


def test_an_error_names_what_holds_the_rate_up():
    model = nn.Sequential(
        nn.Embedding(1000, 32, max_norm=1.0), nn.Linear(32, 64), OwnLSTM(64, 64), nn.Linear(64, 64), nn.Linear(64, 9)
    )
    with pytest.raises(InfeasibleRateError) as error:
        tspc.plan(model, "svd", 0.3, rate_scope="network")
    assert "2 holds 46% of the parameters and stays dense: OwnLSTM is not supported; 0 holds 44%" in str(error.value)
    with pytest.raises(InfeasibleRateError, match="2 holds 46% of the parameters"):
        tspc.plan(model, "svd", size="1kB")
    with pytest.raises(InfeasibleRateError) as error:
        tspc.plan(model, "svd", 0.001)
    assert "holds" not in str(error.value), "with rate_scope=layers only the layers count"
