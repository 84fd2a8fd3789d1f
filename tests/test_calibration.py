"""Calibration: patches, moments, the walk through a network, and what compression makes of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tspc.calibration.gathering import moments_of
from tspc.calibration.moments import Moments
from tspc.calibration.patches import Positions, input_patches, output_rows
from tspc.calibration.samples import Calibration, Part, Samples
from tspc.layers.dense import kernel_of
from tspc.models import NetworkSpec

CONVS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "circular", "bias": False},
    {"groups": 3, "padding": 1},
]


@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("positions", [None, Positions(2, (0, 1)), Positions(3, (2, 0))], ids=str)
def test_patches_times_kernel_are_the_outputs_of_a_convolution(options, positions):
    layer, x = nn.Conv2d(6, 9, 3, **options).double(), torch.randn(4, 6, 11, 8, dtype=torch.float64)
    patches = input_patches(layer, x, positions)
    kernels = layer.weight.reshape(layer.groups, 9 // layer.groups, -1)
    answers = torch.einsum("gpn,gtn->pgt", patches, kernels).flatten(1)
    torch.testing.assert_close(answers, output_rows(layer, layer(x), positions))


@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 7), (2, 4, 5, 7)])
def test_patches_of_a_dense_layer_with_any_leading_dimensions(shape):
    layer, x = nn.Linear(7, 3), torch.randn(shape)
    for positions in (None, Positions(2, (1, 0))):
        answers = input_patches(layer, x, positions)[0] @ layer.weight.T
        torch.testing.assert_close(answers, output_rows(layer, layer(x), positions))


def test_moments_and_the_kernel_that_answers_best():
    x, w = torch.randn(500, 6, dtype=torch.float64) + 1, torch.randn(4, 6, dtype=torch.float64)
    y = x @ w.T + 3
    moments = Moments(6, 4, torch.device("cpu"))
    for part in torch.arange(500).split(120):
        moments.add(x[None, part], y[part])
    found = moments.statistics(torch.zeros(4, 6), centred=True, damping=1e-9)
    torch.testing.assert_close(found.metric.inputs, torch.cov(x.T, correction=0))
    torch.testing.assert_close(found.target, w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.shift(w), torch.full((4,), 3.0, dtype=x.dtype))
    assert found.error(w) < 1e-6
    assert found.error(torch.zeros(4, 6)) == pytest.approx(1)


def test_small_errors_are_exact():
    """The error is a difference of sums near to each other; float32 products would leave no digit of it."""
    x, w = torch.randn(500, 40, dtype=torch.float64), torch.randn(30, 40, dtype=torch.float64)
    moments = Moments(40, 30, torch.device("cpu"))
    moments.add(x[None], x @ w.T)
    found = moments.statistics(w, True, 1e-9)
    difference = torch.randn(30, 40, dtype=torch.float64)
    for size in (1.0, 1e-2, 1e-4, 1e-6):
        rows = x - x.mean(0)
        expected = float((rows @ difference.T).norm() / (rows @ w.T).norm()) * size
        assert found.error(w + size * difference) == pytest.approx(expected, rel=1e-3), size


def test_each_group_of_channels_has_statistics_of_its_own():
    """As of so many layers side by side; fitted is the kernel of all groups, by their mean inputs."""
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 0.03, 5.0], dtype=torch.float64)[:, None, None]
    x, w = scales * torch.randn(3, 400, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    y = torch.einsum("gmn,gtn->mgt", x, w.reshape(3, 2, 5)).flatten(1) + torch.randn(400, 6, dtype=torch.float64)
    weights = torch.eye(6) + 0.1
    own, other = torch.zeros(6, 5), torch.randn(6, 5)
    whole, parts = Moments(5, 6, torch.device("cpu"), groups=3), []
    whole.add(x, y)
    together = whole.statistics(own, True, 1e-3, weights)
    for group in range(3):
        outputs = slice(2 * group, 2 * group + 2)
        part = Moments(5, 2, torch.device("cpu"))
        part.add(x[group : group + 1], y[:, outputs])
        parts.append(part.statistics(own[outputs], True, 1e-3, weights[outputs, outputs]))
    torch.testing.assert_close(together.target, torch.cat([part.target for part in parts]))
    torch.testing.assert_close(together.metric.inputs, sum(part.metric.inputs for part in parts) / 3)
    shifts = [part.shift(other[2 * group : 2 * group + 2]) for group, part in enumerate(parts)]
    torch.testing.assert_close(together.shift(other), torch.cat(shifts))
    lost = [part.error(other[2 * g : 2 * g + 2]) ** 2 for g, part in enumerate(parts)]
    sizes = [float((part.outputs * part.weights).sum()) for part in parts]
    expected = sum(e * s for e, s in zip(lost, sizes, strict=True)) / sum(sizes)
    assert together.error(other) ** 2 == pytest.approx(expected)


def test_directions_never_seen_keep_the_layers_own_weights():
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 2] = 0
    moments = Moments(6, 4, torch.device("cpu"))
    moments.add(x[None], torch.zeros(50, 4, dtype=torch.float64))
    own = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(moments.statistics(own, True, 1e-3).target[:, 2], own[:, 2])


class Twice(nn.Module):
    """The first convolution's output goes into a batch norm and around it; one layer is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.again = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        y = self.first(x)
        y = y + F.relu(self.norm(y))
        y = F.relu_(self.again(F.relu(self.again(y))))
        return self.last(self.norm2(self.second(y)).mean((2, 3)))


class Scaled(nn.Module):
    """Blocks that are called with a constant beside their input."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 8, 3)
            self.outer = nn.Conv2d(8, 3, 3)

        def forward(self, x, scale=1.0):
            return scale * self.outer(F.relu(self.inner(x)))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x, scale=0.5 + number)
        return x.mean((2, 3))


def images(n: int = 24, size: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = NetworkSpec("builtin", "resnet8", 10).build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def convs(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def test_the_trace_finds_batch_norms_and_blocks_that_follow_each_other():
    model = resnet()
    with Samples(images(), Calibration(batch_size=8)) as samples:
        trace = samples.survey(model, convs(model)).trace
    assert trace.batch_norms["layer1.0.conv1"] == "layer1.0.bn1"
    assert [s.module for s in trace.segments] == ["conv1", "layer1.0", "layer2.0", "layer3.0"]
    assert [s.call is not None for s in trace.segments] == [False, False, True, True]


def test_blocks_called_with_constants_follow_each_other():
    model = Scaled().eval()
    with Samples(images(), Calibration(batch_size=8)) as samples:
        trace = samples.survey(model, convs(model)).trace
    first, second = trace.segments
    assert (first.module, first.call, second.module) == ("blocks.0", None, "blocks.1")
    answer = torch.ones(2)
    assert second.call is not None
    assert second.call.made([], ((), {"scale": 1.5}), answer) == ((answer,), {"scale": 1.5})


def test_an_argument_that_depends_on_the_batch_is_no_constant():
    class Counted(Scaled):
        def forward(self, x):
            for number, block in enumerate(self.blocks):
                x = block(x, scale=len(x) + number)
            return x.mean((2, 3))

    model = Counted().eval()
    with Samples(images(), Calibration(batch_size=8)) as samples:
        trace = samples.survey(model, convs(model)).trace
    assert [s.call for s in trace.segments] == [None, None]


def test_an_output_that_is_used_twice_has_no_batch_norm_of_its_own():
    model = Twice().eval()
    with Samples(images()) as samples:
        trace = samples.survey(model, ["first", "again", "second"]).trace
    assert trace.batch_norms == {"second": "norm2"}
    assert trace.calls == {"first": 1, "again": 2, "second": 1}
    assert [s.module for s in trace.segments] == [""], "a layer called twice: the whole network is one segment"


@pytest.mark.parametrize("build", [resnet, lambda: Twice().eval(), lambda: Scaled().eval()])
@pytest.mark.parametrize("memory", [0, 512])
def test_the_walk_sees_what_the_whole_network_sees(build, memory):
    model, x = build(), images()
    names = convs(model)
    settings = Calibration(batch_size=5, patches=10**9, memory=memory)
    with Samples(x, settings) as samples:
        found = dict(moments_of(model, names, samples, samples.survey(model, names).trace))
    for name in names:
        seen = []
        with torch.no_grad(), model.get_submodule(name).register_forward_hook(lambda m, a, o, s=seen: s.append(a[0])):
            model(x)
        rows = torch.cat([input_patches(model.get_submodule(name), s) for s in seen], 1).double()
        assert found[name].count == rows.shape[1]
        seen_by_walk = found[name].statistics(kernel_of(model.get_submodule(name)), False, 0.0)
        inputs = seen_by_walk.inputs - seen_by_walk.damping * torch.eye(rows.shape[-1], dtype=rows.dtype)
        torch.testing.assert_close(inputs, rows.mT @ rows / rows.shape[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "kind", "seen"),
    [((3, 96, 96), torch.float32, 128), ((3, 8, 8), torch.float32, 160), ((512,), torch.int64, 128)],
)
def test_error_curves_see_enough_images_of_any_size(shape, kind, seen):
    """The last layers see few positions of an image; of long texts they see many, so 65,536 tokens are enough."""
    with Samples(torch.zeros(160, *shape, dtype=kind), Calibration(samples=160, batch_size=32)) as samples:
        assert len(Part(samples)) == seen
