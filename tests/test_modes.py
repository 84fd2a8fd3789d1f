"""What the caller has switched on in PyTorch does not matter: the library computes as it does without."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tspc
from tspc.calibration.moments import Moments
from tspc.calibration.samples import Calibration, Samples
from tspc.decompositions import METHODS
from tspc.errors import TspcWarning
from tspc.system.modes import own_modes

SETTINGS = Calibration(samples=32, batch_size=16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, bias=False)
        self.norm, self.hidden, self.head = nn.BatchNorm2d(12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(F.relu(self.first(x)))))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


class Frozen(Net):
    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def images(count: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind().eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def rounded_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


CALLERS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "double": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "rounded": rounded_products,
}
each_caller = pytest.mark.parametrize("caller", CALLERS)


def assert_same(small: nn.Module, other: nn.Module) -> None:
    ours, theirs = small.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert not value.is_inference()
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@each_caller
@pytest.mark.parametrize("calibrated", [False, True])
def test_compress_does_not_see_the_callers_modes(caller, calibrated):
    x = images() if calibrated else None
    model = net()
    expected = tspc.compress(model, "tk", 0.5, calibration=x, settings=SETTINGS)
    with CALLERS[caller]():
        found = tspc.compress(model, "tk", 0.5, calibration=x, settings=SETTINGS)
    assert_same(found, expected)


@each_caller
def test_plan_apply_and_fold_do_not_see_the_callers_modes(caller):
    def steps(model: nn.Module) -> tuple[tspc.Plan, nn.Module]:
        with Samples(images(), SETTINGS) as samples:
            done = tspc.apply_(model, tspc.plan(model, "cp", 0.5, calibration=samples), samples)
        return done, tspc.fold_batch_norms(model, images(2))

    plan, folded = steps(net())
    model = net()
    with CALLERS[caller]():
        found, small = steps(model)
    assert [(row.name, row.rank) for row in found.layers] == [(row.name, row.rank) for row in plan.layers]
    assert found.output_error == pytest.approx(plan.output_error, rel=1e-3)
    assert_same(small, folded)


@each_caller
def test_files_do_not_see_the_callers_modes(caller, tmp_path):
    small = tspc.compress(net(), "rcp", 0.5)
    path = Path(tmp_path, "small.safetensors")
    with CALLERS[caller]():
        tspc.save(small, path)
    dense = net()
    with CALLERS[caller]():
        assert_same(tspc.load(path, dense), small)
        done = tspc.export(small, tmp_path / "state.safetensors", images(2))
    assert done.relative < 1e-6


@pytest.mark.parametrize("kind", [Net, Frozen])
def test_a_network_made_in_inference_mode_is_compressed(kind):
    expected = tspc.compress(net(), "svd", 0.5, calibration=images(), settings=SETTINGS)
    with torch.inference_mode():
        model = net(kind)
        with pytest.warns(TspcWarning, match="comes to conv, hidden") if kind is Frozen else contextlib.nullcontext():
            small = tspc.compress(model, "svd", 0.5, calibration=images(), settings=SETTINGS)
        plan = tspc.plan(model, "svd", 0.5, allocation="uniform")
        tspc.apply_(model, plan)
    assert type(model.hidden) is not nn.Linear
    assert not any(value.is_inference() for value in small.state_dict().values())
    if kind is Net:
        assert_same(small, expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_factors_have_the_kernels_dtype_whatever_the_default(name, dtype):
    kernel = torch.randn(12, 300, 3, 3, generator=torch.Generator().manual_seed(0))
    method = METHODS[name]()
    rank = method.rank_for(tuple(kernel.shape), kernel.numel() // 20)
    expected = method.reconstruct(method.decompose(kernel, rank))
    with default_dtype(dtype), torch.autocast("cpu", torch.bfloat16):
        factors = method.decompose(kernel, rank)
    assert {tensor.dtype for tensor in factors.tensors} == {torch.float32}
    torch.testing.assert_close(method.reconstruct(factors), expected)


def test_a_network_keeps_its_own_defaults():
    """Its forward may make tensors: they are of the dtype that the caller's default says."""

    class Shifted(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + F.linear(torch.ones(len(x), 16), self.head.weight)

    with default_dtype(torch.float64):
        small = tspc.compress(net(Shifted), "tt", 0.5, calibration=images().double(), settings=SETTINGS)
        assert small(images(2).double()).dtype == torch.float64


def test_moments_are_exact_inside_a_network_that_casts():
    x, y = torch.randn(64, 6), torch.randn(64, 4)
    plain, cast = Moments(6, 4, torch.device("cpu")), Moments(6, 4, torch.device("cpu"))
    plain.add(x[None], y)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cast.add(x[None].clone(), y)
    found, expected = (m.statistics(torch.zeros(4, 6), True, 1e-3) for m in (cast, plain))
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.target, expected.target)


def test_switches_of_the_process_come_back_when_the_last_thread_leaves():
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with own_modes():
            inside.set()
            leave.wait(10)

    with rounded_products():
        thread = threading.Thread(target=other)
        with own_modes():
            thread.start()
            inside.wait(10)
        assert not torch.backends.cuda.matmul.allow_tf32, "the other thread still computes"
        leave.set()
        thread.join()
        assert torch.backends.cuda.matmul.allow_tf32


def test_the_original_is_left_as_it_was():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tspc.compress(model, "tt", 0.5, calibration=images(), settings=SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
