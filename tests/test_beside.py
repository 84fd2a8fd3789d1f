"""What lies beside factors on grids: layers of kinds that are not known, and layers that a rule keeps whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import tspc
from tspc.compression.beside import narrow_beside_, wide_parameters
from tspc.compression.integers import state_bytes
from tspc.compression.plan import Plan
from tspc.errors import ConfigError, DecompositionError, WeightsError

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Own(nn.Conv2d):
    """A convolution of a class of its own, as many networks have."""


class OwnUp(nn.ConvTranspose2d):
    """A transposed convolution of a class of its own."""


class OwnAttention(nn.MultiheadAttention):
    """An attention of a class of its own, whose matrices are no layers."""


class OwnGRU(nn.GRU):
    """The same for a recurrent module."""


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.own = Own(24, 24, 3, padding=1, groups=24)
        self.middle = nn.Conv2d(24, 32, 3, padding=1)
        self.up = OwnUp(32, 32, 2)
        self.places = nn.Parameter(torch.randn(81, 32))
        self.attention = OwnAttention(32, 4, batch_first=True)
        self.recurrent = OwnGRU(32, 32, batch_first=True)
        self.sharpness = nn.Parameter(torch.tensor(1.2345678))
        self.last = nn.Linear(32, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.middle(self.own(self.first(x)).relu()).relu()).relu()
        x = x.flatten(2).mT + self.places
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.sharpness * self.last(self.recurrent(x)[0][:, -1])


def network() -> Network:
    return Network().eval()


def plan(**options) -> Plan:
    return tspc.plan(network(), "svd", calibration=IMAGES, **options)


def small(**options) -> nn.Module:
    return tspc.compress(network(), "svd", calibration=IMAGES, **options).eval()


BESIDE = ("own.weight", "own.bias", "up.weight", "places", "attention.in_proj_weight", "recurrent.weight_hh_l0")


def test_kinds_that_are_not_known_have_16_bits(tmp_path):
    made, wanted = small(size=0.4), network()
    state, before = made.state_dict(), wanted.state_dict()
    for name in BESIDE:
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], before[name].half().float()), name
    assert torch.equal(made.sharpness, wanted.sharpness)
    with torch.no_grad():
        assert (made(IMAGES) - wanted(IMAGES)).norm() < 0.2 * wanted(IMAGES).norm()
    assert state_bytes(made) <= 0.4 * state_bytes(wanted)
    found = plan(size=0.4)
    assert found.network_bytes == state_bytes(made)
    kept = {row.name: row.bits for row in found.layers if row.reason is not None}
    assert kept == {"own": 16, "up": 16, "attention.out_proj": 16}
    tspc.save(made, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 0.4 * state_bytes(wanted) + 6000
    assert torch.equal(tspc.load(tmp_path / "a.safetensors", network())(IMAGES), made(IMAGES))


def test_what_the_user_left_out_keeps_its_numbers():
    made = small(size=0.5, exclude=["own", "first", "last"])
    for name in ("own", "first", "last"):
        kept, before = made.get_submodule(name), network().get_submodule(name)
        assert type(kept) is type(before)
        assert torch.equal(kept.weight, before.weight), name
        assert torch.equal(kept.bias, before.bias), name
    assert plan(size=0.5, exclude=["own", "first", "last"]).network_bytes == state_bytes(made)


def test_training_keeps_the_widths():
    made = small(size=0.4, exclude=["own"])
    wide = wide_parameters(made)
    assert "own.weight" in wide
    assert not wide & {"up.weight", "places", "middle.bias"}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1e-5 * torch.randn_like(parameter))
    before = made.own.weight.clone()
    narrow_beside_(made, wide)
    assert torch.equal(made.own.weight, before)
    assert "own.weight" in wide_parameters(made)
    assert not wide_parameters(made) & {"up.weight", "places", "middle.bias"}


def test_numbers_that_float16_cannot_hold_stay_and_count():
    model = network()
    with torch.no_grad():
        model.up.weight.mul_(1e-9)
        model.places.mul_(1e-9)
    made = tspc.compress(model, "svd", size=0.5, calibration=IMAGES)
    assert torch.equal(made.places, model.places)
    assert torch.equal(made.up.weight, model.up.weight)
    assert tspc.plan(model, "svd", size=0.5, calibration=IMAGES).network_bytes == state_bytes(made)
    assert state_bytes(made) <= 0.5 * state_bytes(model)


def test_a_plan_counts_the_numbers_of_the_networks_format():
    for dtype, each in ((torch.float64, 8), (torch.float32, 4), (torch.float16, 2)):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype)
        made = tspc.plan(model, "svd", 0.5, rate_unit="bytes", keep_last=True)
        assert made.layers[-1].bytes == made.layers[-1].dense_bytes == each * 272
        assert made.network_bytes == state_bytes(tspc.compress(model, "svd", 0.5, rate_unit="bytes"))


@pytest.mark.parametrize("size", [0.999, 1.0])
def test_without_a_layer_in_few_bits_nothing_else_has_fewer(size):
    made = small(size=size)
    assert state_bytes(made) == plan(size=size).network_bytes <= size * state_bytes(network())
    if size == 1.0:
        assert wide_parameters(made) == wide_parameters(network())


def test_the_budget_decides_the_width_of_the_first_and_the_last_layer():
    found = {size: {row.name: row for row in plan(size=size).layers} for size in (0.45, 0.36)}
    for rows in found.values():
        for name in ("first", "last"):
            assert rows[name].reason is None
            assert rows[name].method is None or rows[name].method.name == "dense"
    assert found[0.36]["last"].bits < found[0.45]["last"].bits
    fixed = {row.name: row for row in plan(rate=0.4, bits=8).layers}
    assert (fixed["last"].reason, fixed["last"].bits) == ("final layer", 8)


def test_what_is_left_of_a_budget_widens_whole_kernels():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).eval()
    whole = 4 * 64 * 64 * 4
    for share in (0.14, 0.17, 0.2):
        made = tspc.plan(model, "dense", size=share, calibration=torch.randn(64, 64))
        step = 64 * 64 // 8  # a bit more in one layer
        assert share * whole - 2 * step < made.network_bytes <= share * whole


ROWS = torch.randn(64, 24, generator=torch.Generator().manual_seed(2))


class Reused(nn.Module):
    """A module with two names, a weight with two names, and a layer whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(24, 48), nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 16)
        self.e = weight_norm(nn.Linear(48, 48))
        self.again, self.weight = self.b, self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.again, self.c, self.e):
            x = layer(x).relu()
        return self.d(x)


@pytest.mark.parametrize("exclude", [[], ["e"], ["e*"]])
@pytest.mark.parametrize("size", [0.88, 0.95])
def test_sizes_are_kept_where_parameters_have_several_names(tmp_path, exclude, size):
    model = Reused().eval()
    asked = {"size": size, "exclude": exclude, "calibration": ROWS}
    made = tspc.compress(model, "svd", **asked)
    assert tspc.plan(model, "svd", **asked).network_bytes == state_bytes(made) <= size * state_bytes(model)
    assert torch.equal(made.b.weight, model.b.weight)
    is_kept = torch.equal(made.e.parametrizations.weight.original1, model.e.parametrizations.weight.original1)
    assert is_kept == bool(exclude)
    tspc.save(made, tmp_path / "a.safetensors")
    assert torch.equal(tspc.load(tmp_path / "a.safetensors", Reused().eval())(ROWS), made(ROWS))


class Transposed(nn.Module):
    def __init__(self, *kernel: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.last = nn.Linear(24, 32), OwnUp(16, 16, kernel), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def test_float16_numbers_fit_their_own_shape_only(tmp_path):
    tspc.save(tspc.compress(Transposed(3, 1).eval(), "svd", size=0.5), tmp_path / "a.safetensors")
    tspc.load(tmp_path / "a.safetensors", Transposed(3, 1))
    with pytest.raises(
        WeightsError, match=r"of another shape: up\.weight \(16, 16, 3, 1\) instead of \(16, 16, 1, 3\)"
    ):
        tspc.load(tmp_path / "a.safetensors", Transposed(1, 3))


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.ones(5)

    def get_extra_state(self) -> dict[str, Tensor]:
        return {"factor": self.factor}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.factor = state["factor"]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor[0]


def test_extra_state_stays_as_it_is(tmp_path):
    def own() -> nn.Sequential:
        return nn.Sequential(nn.Linear(24, 48), Extra(), nn.Linear(48, 48), nn.Linear(48, 16)).eval()

    model = own()
    model[1].factor.fill_(2)
    made = tspc.compress(model, "svd", size=0.4, calibration=ROWS)
    tspc.save(made, tmp_path / "a.safetensors")
    loaded = tspc.load(tmp_path / "a.safetensors", own())
    assert torch.equal(loaded[1].factor, model[1].factor)
    assert torch.equal(loaded(ROWS), made(ROWS))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(24, 32), nn.Linear(64, 8)
        self.middle = nn.GRU(32, 32, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))[0])[:, -1]


@pytest.mark.slow
@torch.no_grad()
def test_every_size_between_the_smallest_and_the_whole_can_be_had():
    """Also where the numbers beside the layers are nearly all bytes."""
    model, x = Recurrent().eval(), ROWS.reshape(8, 8, 24)
    wanted, errors = model(x), []
    for size in (0.5, 0.52, 0.55, 0.7, 0.99, 1.0):
        made = tspc.compress(model, "svd", size=size, calibration=x)
        assert tspc.plan(model, "svd", size=size, calibration=x).network_bytes == state_bytes(made)
        assert state_bytes(made) <= size * state_bytes(model)
        errors.append(float((made(x) - wanted).norm() / wanted.norm()))
    assert max(errors[2:]) < 0.01
    assert errors[-1] < 1e-6
    unit = {"rate_unit": "bytes", "bits": "auto", "rate_scope": "network"}
    assert tspc.plan(model, "svd", target_error=0.1, calibration=x, **unit).output_error <= 0.1


@pytest.mark.parametrize("options", [{"include": ["middle"]}, {"filter_fn": lambda name, module: name == "middle"}])
def test_the_ends_of_a_network_can_be_left_out(options):
    made = small(size=0.6, **options)
    for name in ("first", "last", "own", "up", "attention.out_proj"):
        assert torch.equal(made.get_submodule(name).weight, network().get_submodule(name).weight), name
    assert plan(size=0.6, **options).network_bytes == state_bytes(made)


def test_parameters_beside_the_layers_can_be_left_out():
    made, before = small(size=0.7, exclude=["recurrent", "attention.*", "places"]), network().state_dict()
    for name in ("recurrent.weight_hh_l0", "attention.in_proj_weight", "attention.out_proj.weight", "places"):
        assert torch.equal(made.state_dict()[name], before[name]), name
    assert not torch.equal(made.up.weight, network().up.weight)
    assert plan(size=0.7, exclude=["recurrent", "attention.*", "places"]).network_bytes == state_bytes(made)
    with pytest.raises(ConfigError, match=r"exclude=\['recurent'\]"):
        plan(size=0.7, exclude=["recurent"])


def test_a_network_without_values_is_refused():
    with torch.device("meta"):
        model = network()
    with pytest.raises(DecompositionError, match="places has no values"):
        tspc.plan(model, "svd", size=0.5)
