"""Finds the path of a tensorized layer that costs least, by a model or by the clock.

A layer with fewer parameters is not always faster. Every path (see `tspc.layers.chains`) is judged for the layer's
input size, as it runs in eval mode with contracted kernels kept. If the size is unknown, a map of `NOMINAL` positions
along each axis is assumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tspc.compression.plan import LayerPlan
from tspc.compression.runtime_costs import WORK, Work, rounded_up
from tspc.data.model_inputs import Given, called
from tspc.decompositions import Decomposition, Rank, Shape
from tspc.deploy.calls import EXTRAS, Run, Unusable, call, family
from tspc.deploy.graphs import Graphs
from tspc.errors import ConfigError
from tspc.layers.chains import REBUILT, Stage, paths_of, stages_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import DenseLayer, kernel_shape
from tspc.layers.forms import default_path, untrained
from tspc.layers.recurrent import is_read
from tspc.layers.unpacking import of_parts
from tspc.traversal.hooks import evaluating, first_argument, hooked

NOMINAL = 14
BATCH = 8
"""Inputs in a batch; they share one reading of the kernels."""
GAIN = 0.9
"""A path is faster than the dense kernel if it costs less than this share of it, because no estimate is exact."""
RUNS, WARM = 5, 2

Size = tuple[int, ...]
"""The size of a layer's input map: (rows, 1) for a dense layer, (1, length) for a 1-d convolution, (rows, columns) for
a 2-d one, (depth, rows, columns) for a 3-d one."""


class Times(Protocol):
    """A table of measured times."""

    def seconds(
        self, form: Form, shape: Shape, size: Size, method: Decomposition, rank: Rank, path: str = REBUILT
    ) -> float: ...


def input_sizes(model: nn.Module, names: Collection[str], images: Given) -> dict[str, Size]:
    """The size of the largest input of each named layer when the network runs on an example; see `calls`."""
    return {name: max(sizes, key=math.prod) for name, sizes in calls(model, names, images).items()}


@of_parts
def calls(model: nn.Module, names: Collection[str], images: Given) -> dict[str, list[Size]]:
    """For each named layer the sizes of its inputs, one for each call, when the network runs on an example.

    Layers that are not called are left out. The result is empty if the network fails on the example.
    """
    sizes: dict[str, list[Size]] = {}

    def on_call(name: str) -> Callable:
        def hook(module: nn.Module, *given: Any) -> None:
            shape = tuple(first_argument(*given).shape)
            if not Form.of(module).is_convolution:
                size = math.prod(shape[:-1]) // max(1, len(images)), 1
            else:
                axes = len(Form.of(module).axes)
                size = (1, shape[-1]) if axes == 1 else shape[-axes:]
            sizes.setdefault(name, []).append(size)

        return hook

    hooks = [(model.get_submodule(name), on_call(name)) for name in names]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    with hooked(handles), evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            called(model, images)
        except Exception:  # the network may be the user's own, with other inputs
            return {}
    return sizes


def map_of(form: Form, size: Size) -> Size:
    """The spatial axes of a layer's input, or the rows of a dense layer's."""
    return size[-len(form.axes) :] if form.is_convolution else size[:1]


def output_size(form: Form, stage: Stage, size: Size) -> Size:
    """The size of the map after a stage of a path."""
    found, count = list(size), len(form.axes)
    pads = [before + behind for before, behind in zip(form.explicit[-2::-2], form.explicit[::-2], strict=True)]
    for i, axis in enumerate(form.axes):
        place = len(size) - count + i
        if axis not in stage.covered:
            continue
        if form.is_transposed(stage):
            found[place] = max(1, form.length(i, found[place]))
        else:
            reach = form.dilation[i] * (form.window[i] - 1) + 1
            found[place] = max(1, (found[place] + pads[i] - reach) // form.stride[i] + 1)
    return tuple(found)


def _positions(form: Form, stage: Stage, before: Size, after: Size) -> int:
    """How often the kernel of a stage is applied: at each output, of a transposed convolution at each input."""
    return math.prod(before if form.is_transposed(stage) else after)


def macs_of(form: Form, stages: list[Stage], size: Size) -> int:
    """Multiply-adds of the stages for one input of this size."""
    total = 0
    for stage in stages:
        before, size = size, output_size(form, stage, size)
        total += _positions(form, stage, before, size) * math.prod(stage.shape)
    return total


@of_parts
def macs_saved(model: nn.Module, rows: Iterable[LayerPlan], called: Mapping[str, Sequence[Size]]) -> int:
    """Multiply-adds for one input that the tensorized layers save on their paths; negative if they need more.

    `called` holds the result of `calls`.
    """
    total = 0
    for row in rows:
        if row.method is None or row.rank is None or row.path is None or row.is_table:
            continue
        form, method = Form.of(model.get_submodule(row.name)), row.method.for_shape(row.shape)
        dense, own = (stages_of(method, row.shape, row.rank, path, form.groups) for path in (REBUILT, row.path))
        total += sum(macs_of(form, dense, size) - macs_of(form, own, size) for size in called.get(row.name, ()))
    return total


@dataclass
class Costs:
    """The cost of a path; smaller is better, and the unit depends on the settings.

    With `objective="macs"` the cost is the multiply-adds. Else `source="model"` estimates the time in `runtime` from
    multiply-adds and entries moved, and `source="measure"` measures it there, for `BATCH` inputs. Without another
    precision in the runtime's name this is the layer's own, on its device. A table of measured `times` goes first; its
    costs are seconds.
    """

    source: str = "model"
    objective: str = "parameters"
    sizes: Mapping[str, Size] = field(default_factory=dict)
    runtime: str = "eager"
    times: Times | None = None
    _known: dict[object, float] = field(default_factory=dict)

    def of(self, layer: nn.Module, name: str, decomposition: Decomposition, rank: Rank, path: str) -> float:
        form = Form.of(layer)
        size = self.sizes.get(name) or (NOMINAL,) * max(2, len(form.axes))
        key = form, kernel_shape(layer), size, decomposition, rank, path
        if path == REBUILT:  # the cost does not depend on the factors
            key = (*key[:3], path)
        if key not in self._known:
            stages = stages_of(decomposition, kernel_shape(layer), rank, path, form.groups)
            if self.objective == "macs":
                cost: float = macs_of(form, stages, size)
            elif self.times is not None:
                cost = self.times.seconds(form, kernel_shape(layer), size, decomposition, rank, path)
            elif self.source == "model":
                cost = estimate(form, stages, size, WORK[self.runtime])
            else:
                cost = measure(cast(DenseLayer, layer), decomposition, rank, path, size, self.runtime)
            self._known[key] = cost
        return self._known[key]

    def best(self, layer: nn.Module, row: LayerPlan) -> LayerPlan:
        """The row of a tensorized layer with the cheapest path; "rebuilt" unless another path is clearly cheaper."""
        if row.method is None or row.rank is None:
            return row
        if is_read(layer) or row.is_table:
            return replace(row, path=REBUILT if is_read(layer) else default_path(layer, row.method))
        method = row.method.for_shape(row.shape)
        options = paths_of(method, row.shape, row.rank, Form.of(layer).groups)
        rank = row.rank
        if len(options) == 1:
            return replace(row, path=options[0])

        def cost(path: str) -> float:
            return self.of(layer, row.name, method, rank, path) / (1.0 if path == REBUILT else GAIN)

        return replace(row, path=min(options, key=cost))

    def is_faster(self, layer: nn.Module, row: LayerPlan) -> bool:
        """Whether a tensorized layer on its path costs less than the dense layer, which costs as much as "rebuilt"."""
        assert row.method is not None
        assert row.rank is not None
        assert row.path is not None
        method = row.method.for_shape(row.shape)
        own, dense = (self.of(layer, row.name, method, row.rank, path) for path in (row.path, REBUILT))
        return own < GAIN * dense


def estimate(form: Form, stages: list[Stage], size: Size, work: Work, batch: int = BATCH) -> float:
    """Estimated time for one input of a batch, in multiply-adds: computing, and moving activations and the kernels."""
    total = 0.0
    for stage in stages:
        before, size = size, output_size(form, stage, size)
        t, s, *_ = stage.shape
        read, written = math.prod(before) * stage.channels, math.prod(size) * t
        padded = 1 if stage.groups > 1 else rounded_up(t, work.outputs) / t * (rounded_up(s, work.inputs) / s)
        operations = _positions(form, stage, before, size) * math.prod(stage.shape)
        total += operations * padded + work.entry * (read + written)
        total += (work.weight * math.prod(stage.shape) + work.call) / batch
    return total


@torch.no_grad()
def measure(
    layer: DenseLayer, decomposition: Decomposition, rank: Rank, path: str, size: Size, runtime: str = "eager"
) -> float:
    """Least seconds of a few runs in eval mode on random inputs; in PyTorch channels last.

    In another runtime this includes what stands around a single layer, such as the conversion to 8 bits; it is the same
    for all paths. Raises ConfigError if the runtime does not take the layer.
    """
    module = untrained(layer, decomposition, rank, path)
    for parameter in module.parameters():
        parameter.fill_(0.01)
    module.eval()
    form, channels = Form.of(layer), module.shape[1] * Form.of(layer).groups
    shape = (BATCH, channels, *map_of(form, size)) if form.is_convolution else (BATCH * size[0], channels)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(layer.weight)
    run = _in_pytorch(module, x) if family(runtime) not in EXTRAS else _elsewhere(module, x, runtime)
    best = math.inf
    for _ in range(RUNS + WARM):
        started = time.perf_counter()
        run()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - started)
    return best


def _in_pytorch(module: nn.Module, x: Tensor) -> Run:
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda: module(x)


def _elsewhere(module: nn.Module, x: Tensor, runtime: str) -> Run:
    try:
        return call(Graphs({"layer": module}, (x,)), "layer", runtime, (x,))
    except Unusable as error:
        raise ConfigError([f"runtime={runtime} with paths=measure: {error}"]) from error
