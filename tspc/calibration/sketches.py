"""What a few inputs show of layers whose second moments would be too large."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.moments import SCARCITY, scarcity
from tspc.calibration.patches import Positions, input_patches
from tspc.calibration.samples import Part, Samples, Survey
from tspc.data.model_inputs import called
from tspc.decompositions import Metric
from tspc.decompositions.metric import Rows
from tspc.layers.dense import DenseLayer, kernel_of
from tspc.system.parallel import in_parts
from tspc.traversal.hooks import first_argument, hooked, running

FEW = 2048
"""About so many rows stand for all inputs of a layer."""


@dataclass(frozen=True)
class Sketch:
    """The norm in which a wide layer is decomposed. `kernel` (T × n) is the layer's own."""

    kernel: Tensor
    metric: Metric

    @classmethod
    def of(cls, kernel: Tensor, rows: Tensor, damping: float, sensitivity: Tensor | None, images: int) -> Sketch:
        """From rows (m × n) of the layer's inputs; the other arguments are those of `Moments.statistics`."""
        count, n = rows.shape
        rows = rows.float() / math.sqrt(count)
        size = float(rows.square().sum()) / n
        shift = (damping + SCARCITY * scarcity(n, count, images)) * size if size > 0 else 1.0
        return cls(
            kernel.detach().flatten(1).float(),
            Metric(Rows(rows, shift), None if sensitivity is None else sensitivity.to(rows)),
        )

    def error(self, kernel: Tensor) -> float:
        """The root of the squared error in the metric, relative to the layer's output."""
        size = self.metric.squared(self.kernel)
        lost = self.metric.squared(self.kernel - kernel.detach().flatten(1).to(self.kernel))
        return math.sqrt(lost / size) if size > 0 else 0.0


def sketches_of(
    model: nn.Module, layers: Collection[str], samples: Samples, survey: Survey, images: Part | None = None
) -> Iterator[tuple[str, Sketch]]:
    """A sketch for each of the layers that the network calls, from all samples or a part; the network is in eval mode.

    One pass over the network serves as many layers as fit into memory together.
    """
    reached = [name for name in layers if survey.trace.calls.get(name)]
    size = lambda name: 4 * FEW * kernel_of(model.get_submodule(name))[0].numel() / 2**20  # noqa: E731
    for part in in_parts(reached, size, samples.settings.memory):
        yield from _together(model, part, samples, survey, images or samples)


@torch.no_grad()
def _together(
    model: nn.Module, layers: Collection[str], samples: Samples, survey: Survey, images: Samples | Part
) -> Iterator[tuple[str, Sketch]]:
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    most = max(1, FEW // max(1, sum(1 for _ in images)))

    def hook(name: str, batch: int) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any, outputs: Tensor) -> None:
            layer = cast(DenseLayer, module)
            seed, masks = zlib.crc32(name.encode()) + batch, samples.kept.masks(batch, name)
            positions = Positions.at_most(most, layer, outputs.shape, seed, masks)
            rows = input_patches(layer, first_argument(args, kwargs), positions).flatten(0, 1)
            found[name].append(rows.clone())  # a later operation may change the input in place

        return see

    for number, batch in enumerate(images):
        handles = [model.get_submodule(n).register_forward_hook(hook(n, number), with_kwargs=True) for n in found]
        with hooked(handles), running(number, samples.short):
            called(model, batch)
    for name in [name for name in layers if found[name]]:
        rows, kernel = torch.cat(found.pop(name)), kernel_of(model.get_submodule(name))
        yield name, Sketch.of(kernel, rows, samples.settings.damping, survey.weights(name), len(images))
