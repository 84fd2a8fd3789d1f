"""What compression makes of calibration: answers closer to the reference's, and nothing else changed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.methods import FAMILIES
from tests.test_calibration import Twice, convs, images, resnet
from tspc.calibration.gathering import moments_of
from tspc.calibration.moments import Moments
from tspc.calibration.patches import input_patches
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import tensorized
from tspc.compression.compress import compress
from tspc.compression.planning import plan
from tspc.decompositions import SVD, Auto, TensorTrain
from tspc.errors import ConfigError, DataError, DecompositionError
from tspc.layers.dense import kernel_of
from tspc.layers.forms import tensorized_layers


def output_distance(model: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        a, b = model(x), small(x)
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("method", [*FAMILIES, Auto((SVD(), TensorTrain()))], ids=str)
def test_function_space_and_compensation_bring_the_answer_closer(method):
    model, x = resnet(), images(64)
    before = copy.deepcopy(model.state_dict())
    plain = compress(model, method, 0.4, allocation="uniform")
    fitted = compress(model, method, 0.4, calibration=x, settings=Calibration(samples=64, batch_size=16))
    assert output_distance(model, fitted, images(32, seed=1)) < 0.8 * output_distance(model, plain, images(32, seed=1))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "the original is kept"


@pytest.mark.parametrize("build", [resnet, lambda: Twice().eval()])
def test_the_mean_of_a_layers_output_is_the_references(build):
    model, x = build(), images(40)
    name = "layer2.0.conv1" if hasattr(model, "layer2") else "second"
    norm = "layer2.0.bn1" if hasattr(model, "layer2") else "norm2"
    settings = Calibration(batch_size=8, patches=10**9, batch_norm="keep")
    with Samples(x, settings) as samples:
        small, _ = tensorized(model, plan(model, "svd", 0.3, calibration=samples, allocation="uniform"), samples)
    means = []
    for network in (model, small):
        seen = []
        with (
            torch.no_grad(),
            network.get_submodule(norm).register_forward_hook(lambda m, a, o, s=seen: s.append(o.mean((0, 2, 3)))),
        ):
            network(x)
        means.append(seen[0])
    assert name
    torch.testing.assert_close(*means, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("calibration", [None, images()])
def test_whoever_waits_is_told_of_each_layer(calibration):
    told: list[str] = []
    small = compress(resnet(), "svd", 0.3, calibration=calibration, on_layer=told.append)
    assert {told.count(name) for name in tensorized_layers(small)} == {2}


@pytest.mark.parametrize("batch_norm", ["keep", "recalibrate", "auto"])
def test_batch_norms_are_left_in_eval_mode(batch_norm):
    small = compress(resnet(), "tt", 0.3, calibration=images(), settings=Calibration(batch_norm=batch_norm))
    assert not any(module.training for module in small.modules())
    assert all(torch.isfinite(value).all() for value in small.state_dict().values())


def test_where_nothing_is_tensorized_nothing_changes():
    model = resnet()
    with Samples(images(40), Calibration(batch_size=8)) as samples:
        made = plan(model, "svd", 0.3, calibration=samples)
        dense = replace(made, layers=tuple(replace(layer, method=None, rank=None) for layer in made.layers))
        small, _ = tensorized(model, dense, samples)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_single_image_and_a_dead_channel():
    model = resnet()
    with torch.no_grad():
        model.layer1[0].bn1.weight[3] = 0
        model.layer1[0].bn1.bias[3] = 0
    small = compress(model, "tk", 0.4, calibration=images(1))
    assert math.isfinite(output_distance(model, small, images(8)))


def test_batches_with_labels_are_taken_like_images():
    x = images(20)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(20)), batch_size=7)
    settings = Calibration(samples=16, batch_size=5)
    with Samples(loader, settings) as some:
        assert [len(batch) for batch in some] == [5, 5, 5, 1]
        assert torch.equal(torch.cat(list(some)), x[:16])


def test_no_image_is_an_error():
    with pytest.raises(DataError, match="at least one input"):
        Samples([])


def test_a_bad_kernel_is_named_and_nothing_changes():
    model = resnet()
    with torch.no_grad():
        model.layer3[0].conv2.weight[0] = math.nan
    for calibration in (None, images()):
        with pytest.raises(DecompositionError, match=r"layer3.0.conv2.weight holds NaN"):
            compress(model, "svd", 0.3, calibration=calibration)


def test_few_rows_hardly_move_the_kernel():
    """The best kernel for noise is the layer's own, however well another one would fit the few rows seen."""
    torch.manual_seed(0)
    own = torch.randn(4, 60, dtype=torch.float64)
    x = torch.randn(20, 60, dtype=torch.float64)
    moments = Moments(60, 4, torch.device("cpu"))
    moments.add(x[None], x @ own.T + torch.randn(20, 4, dtype=torch.float64))
    found = moments.statistics(own, False, 1e-3).target
    fresh = torch.randn(500, 60, dtype=torch.float64)
    assert float((fresh @ (found - own).T).square().mean()) < 1e-9, "0.7 where few rows count as many"


def chain(inplace: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 1))


def test_an_activation_in_place_is_not_skipped():
    model, x = chain(True), images()
    with Samples(x, Calibration(batch_size=8, patches=10**9)) as samples:
        found = dict(moments_of(model, ["2", "4"], samples, samples.survey(model, ["2", "4"]).trace))
    with torch.no_grad():
        rows = input_patches(model[4], model[:4](x)).double()
    inputs = found["4"].statistics(kernel_of(model[4]), False, 0.0).inputs
    torch.testing.assert_close(inputs, rows.mT @ rows / rows.shape[1], rtol=1e-4, atol=1e-6)


def test_a_network_with_one_output_is_not_lost():
    model, x = chain(False), images(48)
    with Samples(x, Calibration(batch_size=16)) as samples:
        made = plan(model, "svd", target_error=0.3, calibration=samples, keep_first=False)
        small, done = tensorized(model, made, samples)
    assert 0.1 < made.rate < 1
    assert done.output_error is not None
    assert done.output_error > 0
    assert output_distance(model, small, images(16, seed=1)) < 0.5


def test_the_sensitivity_does_not_see_the_bias():
    found = []
    for bias in (0.0, 100.0):
        model = chain(False)
        with torch.no_grad():
            model[4].bias.fill_(bias)
        with Samples(images(8)) as samples:
            found.append(samples.survey(model, ["4"]).sensitivity["4"][0])
    torch.testing.assert_close(*found)


def test_a_dense_net_finds_the_norms_of_its_own():
    from torchvision.models import DenseNet

    model = DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10).eval()
    names = convs(model)
    with Samples(images(4, 32)) as samples:
        trace = samples.survey(model, names).trace
    assert trace.batch_norms["features.conv0"] == "features.norm0"
    for name, norm in trace.batch_norms.items():
        assert model.get_submodule(norm).num_features == model.get_submodule(name).out_channels
    assert not any(name.endswith("conv2") for name in trace.batch_norms), "their outputs are concatenated"


@pytest.mark.parametrize("calibrated", [False, True])
def test_modes_and_random_numbers_are_left_alone(calibrated):
    model = resnet().train()
    model.layer1[0].bn1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(5)
    small = compress(model, "svd", 0.3, calibration=images() if calibrated else None, exclude=["layer1*", "layer2*"])
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(module.training == modes[name] for name, module in small.named_modules() if name in modes)
    assert small.layer3[0].conv1[0].training


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"image": torch.rand(2, 3, 8, 8)}], "takes x, and a batch has image: name them"),
        ([torch.rand(2, 3, 8, 8), torch.rand(2, 3, 9, 9)], "not all of one size"),
        (torch.full((2, 3, 8, 8), math.nan), "holds NaN"),
        (torch.rand(2, 4, 16, 16), "cannot take the calibration inputs"),
    ],
)
def test_wrong_images_are_an_error_of_ours(given, message):
    with pytest.raises(DataError, match=message):
        compress(resnet(), "svd", 0.3, calibration=given, settings=Calibration(batch_size=4))


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"calibration.batch_norm=foo.*|calibration.batch_size=0"):
        Samples(images(), Calibration(batch_size=0, batch_norm="foo"))


@pytest.mark.parametrize("method", ["svd", "cp", "rtk"])
def test_grouped_convolutions_are_fitted_to_their_outputs(method):
    torch.manual_seed(0)
    mix = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.ReLU()]
    model = nn.Sequential(*mix, nn.Conv2d(12, 24, 3, groups=3), nn.ReLU(), nn.Conv2d(24, 4, 1)).eval()
    x, fresh = images(64), images(96)[64:]

    def lost(calibration: torch.Tensor | None) -> float:
        small = compress(model, method, 0.4, calibration=calibration, include=["4"])
        with torch.no_grad():
            return float((small(fresh) - model(fresh)).square().mean())

    assert lost(x) < 0.7 * lost(None)


class Autoencoder(nn.Module):
    """Ends with a layer that cannot be tensorized."""

    def __init__(self, last: nn.Module):
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), last

    def forward(self, x):
        return self.last(torch.relu(self.inner(torch.relu(self.first(x)))))


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 3, 3))


LASTS = [
    lambda: nn.Conv2d(16, 16, 3, groups=16),
    weight_normed,
]


@pytest.mark.parametrize("last", LASTS)
def test_a_last_layer_without_support_stays_as_it_is(last):
    torch.manual_seed(0)
    model, x = Autoencoder(last()).eval(), images(32)
    made = plan(model, "svd", 0.5)
    reason = next(row.reason for row in made.layers if row.name == "last")
    assert reason in ("depthwise convolution", "ParametrizedConv2d is not supported")
    small = compress(model, "svd", 0.5, calibration=x, settings=Calibration(batch_size=16))
    ours, theirs = small.last.state_dict(), model.last.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert output_distance(model, small, images(8, seed=1)) < output_distance(
        model, compress(model, "svd", 0.5), images(8, seed=1)
    )
