"""3-d and transposed convolutions: every argument, method and path, and networks of them."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tspc
from tests.methods import FAMILIES
from tests.test_conv_arguments import random_
from tspc.calibration.patches import Positions, input_patches, output_rows
from tspc.calibration.samples import Calibration
from tspc.compression.path_costs import macs_of
from tspc.decompositions import METHODS
from tspc.layers.chains import REBUILT, paths_of, stages_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import TRANSPOSED, kernel_of, kernel_shape, kind_of, set_kernel_
from tspc.layers.forms import Chain, tensorize, tensorized_layers, untrained

PLAIN = {"conv3d": (nn.Conv3d, (3, 2, 3))}
TURNED = {
    "conv_transpose1d": (nn.ConvTranspose1d, (3,)),
    "conv_transpose2d": (nn.ConvTranspose2d, (3, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d, (2, 3, 1)),
}
KINDS = PLAIN | TURNED
ARGUMENTS = ({}, {"stride": 2, "padding": 1, "groups": 2}, {"stride": 3, "dilation": 2, "bias": False})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(axes: int, channels: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(2, channels, *(5, 6, 5)[:axes], dtype=torch.float64, generator=generator(seed))


def layers_of(kind: str) -> list[nn.Module]:
    """Layers of a kind with all its arguments."""
    made, window = KINDS[kind]
    more: tuple[dict, ...] = ({"padding_mode": "circular", "padding": 1}, {"padding": "same", "dilation": (1, 2, 1)})
    if kind in TURNED:
        more = ({"stride": 3, "output_padding": 2}, {"stride": 2, "dilation": 2, "padding": 2, "output_padding": 1})
    return [made(8, 6, window, **given).double() for given in (*ARGUMENTS, *more)]


@pytest.mark.parametrize(("kind", "name"), [*product(KINDS, METHODS)])
def test_every_path_equals_the_layer_with_the_rebuilt_kernel(kind, name):
    for layer in layers_of(kind):
        x, shape = inputs(len(layer.kernel_size)), kernel_shape(layer)
        method = METHODS[name]().for_shape(shape)
        small = untrained(layer, method, tuple(min(2, top) for top in method.max_rank(shape)))
        random_(small)
        wanted = torch.func.functional_call(layer, {"weight": small.weight.detach(), "bias": small.bias}, (x,))
        for path, training in product(paths_of(method, shape, small.rank, layer.groups), (True, False)):
            small.path = path
            torch.testing.assert_close(small.train(training)(x), wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(small(x[0]), wanted[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_a_call_may_ask_for_the_size_of_the_output(name):
    layer = nn.ConvTranspose2d(8, 6, 3, stride=(2, 3), padding=1).double()
    small = tensorize(layer, METHODS[name](), METHODS[name]().max_rank(kernel_shape(layer)))
    x = inputs(2)
    for path, size in product(small.paths, ([10, 18], [2, 6, 9, 16])):
        small.path = path
        torch.testing.assert_close(small(x, output_size=size), layer(x, output_size=size), rtol=1e-8, atol=1e-8)
    for network in (layer, small):
        with pytest.raises(ValueError, match="output_size|requested an output size"):
            network(x, [11, 18])
    with pytest.raises(TypeError, match="takes no output_size"):
        tensorize(nn.Conv2d(8, 6, 3), METHODS[name](), (1,) * len(small.rank))(x.float(), [3, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_exact_and_a_kernel_can_be_set(kind):
    for layer in layers_of(kind):
        x, method = inputs(len(layer.kernel_size)), METHODS["tk"]().for_shape(kernel_shape(layer))
        small = tensorize(layer, method, method.max_rank(kernel_shape(layer)))
        assert isinstance(small, Chain) == (layer.groups == 1)
        torch.testing.assert_close(small(x), layer(x))
        other = copy.deepcopy(layer)
        set_kernel_(other, 2 * kernel_of(small))
        torch.testing.assert_close(other.weight, 2 * layer.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [None, Positions(3, (1, 0, 2))])
def test_patches_times_the_kernel_are_the_outputs(kind, positions):
    for layer in layers_of(kind):
        x = inputs(len(layer.kernel_size)).repeat(1, 1, *(3 for _ in layer.kernel_size))
        patches, kernels = input_patches(layer, x, positions), kernel_of(layer).flatten(1).chunk(layer.groups)
        rows = torch.cat([p @ k.T for p, k in zip(patches, kernels, strict=True)], 1)
        torch.testing.assert_close(rows, output_rows(layer, layer(x), positions))


def test_patches_of_a_transposed_convolution_see_every_tap_at_any_size():
    layer, x = nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1).double(), torch.ones(1, 2, 20, 20).double()
    for size in ([40, 40], [41, 41]):
        outputs = layer(x, size)
        positions = Positions.at_most(110, layer, outputs.shape, seed=1)
        assert positions.step == 3  # with 4 it would meet one tap in four only
        rows = input_patches(layer, x, positions)[0]
        assert bool((rows != 0).any(0).all())
        torch.testing.assert_close(rows @ kernel_of(layer).flatten(1).T, output_rows(layer, outputs, positions))


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_of_a_layer_are_counted(kind):
    for layer in layers_of(kind)[:3]:
        form, shape, x = Form.of(layer), kernel_shape(layer), inputs(len(layer.kernel_size))[:1]
        size = tuple(x.shape[2:]) if len(form.axes) > 1 else (1, x.shape[-1])
        with FlopCounterMode(display=False) as counter:
            layer(x)
        stages = stages_of(METHODS["svd"](), shape, (1,), REBUILT, form.groups)
        assert macs_of(form, stages, size) == counter.get_total_flops() // 2


class Volumes(nn.Module):
    """Halves a volume and brings it back to its size, as networks for segmentation do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1)
        self.down = nn.Conv3d(8, 16, (1, 3, 3), stride=2, padding=(0, 1, 1))
        self.norm = nn.BatchNorm3d(16)
        self.up = nn.ConvTranspose3d(16, 12, 2, stride=2)
        self.normed = nn.BatchNorm3d(12)
        self.head = nn.Conv3d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.down(F.relu(self.stem(x)))))
        return self.head(F.relu(self.normed(self.up(y, output_size=x.shape[2:]))))


class Decoder(nn.Module):
    """Upsamples a map and a signal, as generators and vocoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 16, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.signal = nn.ConvTranspose1d(8, 12, 6, stride=3)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.up(F.relu(self.enter(x)))))
        return self.head(F.relu(self.signal(F.relu(self.grouped(y)).mean(2))).transpose(1, 2))


def network(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    """A network with some statistics, and inputs with a falling spectrum."""
    torch.manual_seed(0)
    model, axes = kind(), 3 if kind is Volumes else 2
    channels = 1 if kind is Volumes else 2
    x = torch.randn(48, channels, *(1,) * axes) + 0.2 * torch.randn(48, channels, *(6,) * axes)
    with torch.no_grad():
        model(x)
    return model.eval(), x


NETWORKS = {Volumes: {"down", "up"}, Decoder: {"up", "grouped", "signal"}}
OTHER_EXPORTS = ((Volumes, "pt2"), (Volumes, "onnx"), (Decoder, "onnx"))
GIVEN = {"allocation": "uniform"}


@pytest.mark.parametrize(("kind", "name"), [(Volumes, "svd"), *product((Decoder,), FAMILIES)])
def test_a_network_of_them(kind, name, tmp_path):
    model, x = network(kind)
    settings = Calibration(samples=48, batch_size=16)
    small = tspc.compress(model, name, 0.6, calibration=x, settings=settings, **GIVEN)
    done = tensorized_layers(small)
    assert done.keys() == NETWORKS[kind]
    rebuilt = copy.deepcopy(model)
    rebuilt.load_state_dict({k: v for k, v in small.state_dict().items() if k in rebuilt.state_dict()}, strict=False)
    for layer, module in done.items():
        dense = rebuilt.get_submodule(layer)
        dense.weight.data = module.weight.detach().clone()
        if dense.bias is not None:
            dense.bias.data = module.bias.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(small(x), rebuilt(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tspc.fold_batch_norms(small, x)(x), small(x), rtol=1e-4, atol=1e-5)
        tspc.save(small, tmp_path / "a.safetensors")
        assert torch.equal(tspc.load(tmp_path / "a.safetensors", network(kind)[0])(x), small(x))


def error(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_the_layers_see_and_compensation_lower_the_error(kind):
    model, x = network(kind)
    found = []
    for given, compensate in ((None, False), (x, False), (x, True)):
        settings = Calibration(samples=48, compensate=compensate, sensitivity=False, batch_norm="keep")
        small = tspc.compress(model, "svd", 0.35, calibration=given, settings=settings, **GIVEN)
        found.append(error(model, small, x))
    assert found[1] < 0.8 * found[0]
    assert found[2] < found[1]


@pytest.mark.parametrize("kind", NETWORKS)
def test_factors_in_few_bits(kind, tmp_path):
    model, x = network(kind)
    found = []
    for bits in (8, 4):
        small = tspc.compress(model, "svd", 0.8, calibration=x, bits=bits, **GIVEN)
        assert {layer.bits for layer in tensorized_layers(small).values()} == {bits}
        assert tensorized_layers(small).keys() > NETWORKS[kind]  # the first and the last in 8 bits, too
        tspc.save(small, tmp_path / "b.safetensors")
        with torch.no_grad():
            assert torch.equal(tspc.load(tmp_path / "b.safetensors", network(kind)[0])(x), small(x))
        found.append((error(model, small, x), (tmp_path / "b.safetensors").stat().st_size))
    assert found[0][0] < found[1][0] < 0.5
    assert found[0][1] > found[1][1]


@pytest.mark.parametrize(
    ("kind", "form"), [(Decoder, "pt2"), *(pytest.param(k, f, marks=pytest.mark.slow) for k, f in OTHER_EXPORTS)]
)
def test_exported(kind, form, tmp_path):
    model, x = network(kind)
    small = tspc.compress(model, "tt", 0.6, **GIVEN)
    tspc.export(small, tmp_path / f"a.{form}", x[:2])  # compares the answers of the file
    assert (tmp_path / f"a.{form}").exists()


@pytest.mark.slow
def test_integers_of_transposed_convolutions_are_those_of_the_file(tmp_path):
    model, x = network(Decoder)
    del model.grouped  # the quantizer has no scales for groups
    model.grouped = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
    small = tspc.compress(model.eval(), "svd", 0.8, calibration=x, bits=8, **GIVEN)
    for layer in tensorized_layers(small).values():
        layer.path = layer.paths[0]
    done = tspc.export(small, tmp_path / "net.int8.onnx", x)
    assert done.int8 is not None
    assert done.int8.on_grids == done.int8.weights == 8


def test_subclasses_and_depthwise_layers_stay_dense():
    class Own(nn.Conv3d): ...

    wide = nn.ConvTranspose2d(12, 12, 3, groups=12)
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": Own(4, 4, 3), "c": wide, "d": nn.Linear(40, 40)})
    reasons = {row.name: row.reason for row in tspc.plan(model, "svd", 0.5, keep_last=False).layers}
    assert reasons["b"] == "Own is not supported"
    assert reasons["c"] == "depthwise convolution"


def test_kinds_are_known():
    assert {kind_of(layers_of(kind)[0]) for kind in KINDS} == set(KINDS)
    assert set(TURNED) == set(TRANSPOSED)
