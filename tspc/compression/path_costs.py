"""Which path a tensorized layer takes: the one that costs least, by a model or by the clock.

Fewer parameters are not yet fewer seconds. For a layer whose input size is known, every path (see
`tspc.layers.chains`) is judged as it runs in eval mode, with contracted kernels kept. Without a size a map of `NOMINAL`
positions is assumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.compression.plan import LayerPlan
from tspc.decompositions import Decomposition, Rank
from tspc.layers.chains import REBUILT, Stage, paths_of, stages_of
from tspc.layers.dense import DenseLayer, Form, kernel_shape
from tspc.layers.forms import untrained
from tspc.traversal.hooks import evaluating, first_argument, hooked

PATHS = ("model", "measure")
OBJECTIVES = ("parameters", "latency", "macs")
NOMINAL = (14, 14)
BATCH = 8
"""Inputs that share one reading of the kernels."""
VECTOR = 16
"""Channels are computed in multiples of it."""
MACS_PER_BYTE = 8.0
"""Multiply-adds of 32-bit numbers that take as long as moving a byte, on one core of a CPU with AVX-512."""
CALL = 2e5
"""Multiply-adds that take as long as calling one more operation for a batch."""
GAIN = 0.9
"""A path counts as faster than the dense kernel if it costs less than this share of it: no estimate is exact."""
RUNS, WARM = 5, 2

Size = tuple[int, int]
"""Rows and columns of a layer's input map; of a dense layer (rows, 1), of a 1-d convolution (1, length)."""


def input_sizes(model: nn.Module, names: Collection[str], images: Tensor) -> dict[str, Size]:
    """The largest input of some layers when the network is given an example; see `calls`."""
    return {name: max(sizes, key=math.prod) for name, sizes in calls(model, names, images).items()}


def calls(model: nn.Module, names: Collection[str], images: Tensor) -> dict[str, list[Size]]:
    """The sizes of the inputs of some layers at every call, when the network is given an example.

    Empty if the network cannot take the example, and without the layers that are not called.
    """
    sizes: dict[str, list[Size]] = {}

    def on_call(name: str) -> Callable:
        def hook(module: nn.Module, *given: Any) -> None:
            shape = tuple(first_argument(*given).shape)
            if not Form.of(module).is_convolution:
                size = math.prod(shape[:-1]) // max(1, len(images)), 1
            else:
                size = cast(Size, shape[-2:]) if Form.of(module).kind == "conv2d" else (1, shape[-1])
            sizes.setdefault(name, []).append(size)

        return hook

    called = [(model.get_submodule(name), on_call(name)) for name in names]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in called]
    with hooked(handles), evaluating(model), torch.no_grad():
        try:
            model(images)
        except Exception:  # the network may be the user's own, and take something else
            return {}
    return sizes


def output_size(form: Form, stage: Stage, size: Size) -> Size:
    """The map after a stage of a path."""
    if not form.is_convolution:
        return size
    found = list(size)
    axes = "w" if form.kind == "conv1d" else "hw"
    for axis, stride, dilation, *sides in zip(
        axes, form.stride, form.dilation, form.explicit[-2::-2], form.explicit[::-2], strict=True
    ):
        if axis in stage.covered:
            i = "hw".index(axis)
            reach = dilation * (stage.shape[2 + i] - 1) + 1
            found[i] = max(1, (found[i] + sum(sides) - reach) // stride + 1)
    return found[0], found[1]


def macs_of(form: Form, stages: list[Stage], size: Size) -> int:
    """Multiply-adds for one input."""
    total = 0
    for stage in stages:
        size = output_size(form, stage, size)
        total += math.prod(size) * math.prod(stage.shape)
    return total


def macs_saved(model: nn.Module, rows: Iterable[LayerPlan], called: Mapping[str, Sequence[Size]]) -> int:
    """Multiply-adds for one input that the paths of tensorized layers do without; negative if they need more.

    `called` has the sizes of a layer's inputs at its `calls`.
    """
    total = 0
    for row in rows:
        if row.method is None or row.rank is None or row.path is None:
            continue
        form, method = Form.of(model.get_submodule(row.name)), row.method.for_shape(row.shape)
        dense, own = (stages_of(method, row.shape, row.rank, path, form.groups) for path in (REBUILT, row.path))
        total += sum(macs_of(form, dense, size) - macs_of(form, own, size) for size in called.get(row.name, ()))
    return total


@dataclass
class Costs:
    """What a path costs; the unit depends on the kind, smaller is better.

    With `objective="macs"` multiply-adds alone count. Else `paths="model"` estimates the time from multiply-adds and
    bytes moved, and `paths="measure"` takes it on the device of the layer, in its precision, for `BATCH` inputs.
    """

    paths: str = "model"
    objective: str = "parameters"
    sizes: Mapping[str, Size] = field(default_factory=dict)
    _known: dict[object, float] = field(default_factory=dict)

    def of(self, layer: nn.Module, name: str, decomposition: Decomposition, rank: Rank, path: str) -> float:
        size, form = self.sizes.get(name, NOMINAL), Form.of(layer)
        key = form, kernel_shape(layer), size, decomposition, rank, path
        if path == REBUILT:  # then it is all one which factors the kernel comes from
            key = (*key[:3], path)
        if key not in self._known:
            stages = stages_of(decomposition, kernel_shape(layer), rank, path, form.groups)
            if self.objective == "macs":
                cost: float = macs_of(form, stages, size)
            elif self.paths == "model":
                cost = estimate(form, stages, size)
            else:
                cost = measure(cast(DenseLayer, layer), decomposition, rank, path, size)
            self._known[key] = cost
        return self._known[key]

    def best(self, layer: nn.Module, row: LayerPlan) -> LayerPlan:
        """The row of a tensorized layer with its cheapest path; "rebuilt" unless another is clearly cheaper."""
        if row.method is None or row.rank is None:
            return row
        method = row.method.for_shape(row.shape)
        options = paths_of(method, row.shape, row.rank, Form.of(layer).groups)
        rank = row.rank

        def cost(path: str) -> float:
            return self.of(layer, row.name, method, rank, path) / (1.0 if path == REBUILT else GAIN)

        return replace(row, path=min(options, key=cost))

    def is_faster(self, layer: nn.Module, row: LayerPlan) -> bool:
        """Whether a tensorized layer on its path costs less than the dense one, which runs like a rebuilt kernel."""
        assert row.method is not None
        assert row.rank is not None
        assert row.path is not None
        method = row.method.for_shape(row.shape)
        own, dense = (self.of(layer, row.name, method, row.rank, path) for path in (row.path, REBUILT))
        return own < GAIN * dense


def estimate(form: Form, stages: list[Stage], size: Size) -> float:
    """Multiply-adds for one input, plus those that moving its activations and its share of the kernels is worth."""
    total = 0.0
    for stage in stages:
        before, size = math.prod(size) * stage.channels, output_size(form, stage, size)
        t, s, h, w = stage.shape
        after = math.prod(size) * t
        vectors = 1 if stage.groups > 1 else -(-t // VECTOR) * VECTOR / t * (-(-s // VECTOR) * VECTOR / s)
        moved = 4 * (before + after + math.prod(stage.shape) / BATCH)
        total += after * s * h * w * vectors + MACS_PER_BYTE * moved + CALL / BATCH
    return total


@torch.no_grad()
def measure(layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str, size: Size) -> float:
    """Least seconds of a few runs in eval mode on random inputs, channels last."""
    module = untrained(layer, decomposition, rank, path)
    for parameter in module.parameters():
        parameter.fill_(0.01)
    module.eval()
    form, channels = Form.of(layer), module.shape[1] * Form.of(layer).groups
    shape = {"conv2d": (BATCH, channels, *size), "conv1d": (BATCH, channels, size[1])}.get(
        form.kind, (BATCH * size[0], channels)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(layer.weight)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    best = math.inf
    for _ in range(RUNS + WARM):
        started = time.perf_counter()
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - started)
    return best
