"""How a run chooses its ranks: from its settings, its calibration images, and the measured error curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from tspc.calibration.samples import Calibration, Samples
from tspc.compression.compress import at_share, in_time
from tspc.compression.curves import error_curves
from tspc.compression.error_curve import Curves
from tspc.compression.outline import Outline, outline
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.planning import keeper_for, planned
from tspc.compression.progress import work_on
from tspc.compression.settings import PlanSettings
from tspc.compression.time_plans import Timekeeper
from tspc.data import Given
from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.system.tally import counting


def example_input(model: nn.Module, network: NetworkSpec) -> Tensor | None:
    """An image of zeros, of the size that the network takes; None if the size is not known."""
    if network.image_size is None:
        return None
    parameter = next(model.parameters(), torch.zeros(()))
    return parameter.new_zeros(1, network.in_channels, network.image_size, network.image_size)


@contextmanager
def calibration_samples(calibration: Calibration, context: Context) -> Iterator[Samples | None]:
    """Calibration images, from the training images; None if there is no data, or `samples` is 0."""
    if context.data is None or calibration.samples == 0:
        yield None
        return
    batches = context.data.calibration_batches(calibration.samples, calibration.batch_size, context.device)
    with context.tally("calibrate") as tally:
        samples = Samples(batches, calibration, context.device, tally)
    with samples:
        yield samples


def measure_curves(
    reference: nn.Module, layers: Sequence[LayerPlan], settings: PlanSettings, samples: Samples | None, context: Context
) -> Curves:
    """The error curves of the layers: the error of each layer at any size."""
    sizes = {layer.name: work_on(layer.kernel_params) for layer in layers if layer.reason is None}
    with context.tally("plan", f"{len(sizes)} layers", sum(sizes.values())) as tally, counting(samples, tally):
        done = lambda name: tally.add(name, sizes[name])  # noqa: E731
        return error_curves(reference, layers, settings.method, samples, widths=settings.widths, on_layer=done)


@dataclass(frozen=True)
class Planning:
    """How one run plans. `measured` returns the error curves of an outline's layers: from a file, or measured now.

    `shown` is an input of the data set, where the description of the network does not tell the size of an input.
    """

    settings: PlanSettings
    calibration: Calibration
    reference: nn.Module
    network: NetworkSpec
    measured: Callable[[Outline, Samples | None], Curves]
    shown: Given | None = None

    @cached_property
    def sketch(self) -> Outline:
        """The layers of the network, and which can be tensorized; found once in a run. Raises what `outline` raises."""
        return outline(self.reference, self.settings)

    @property
    def example(self) -> Given | None:
        """An input that shows the sizes of the layers' inputs."""
        if self.shown is None:
            return example_input(self.reference, self.network)
        return self.shown.to(next(self.reference.parameters(), torch.zeros(())).device)

    def curves(self, samples: Samples | None) -> Curves:
        return self.measured(self.sketch, samples)

    def plan(self, curves: Curves | None) -> Plan:
        """The ranks that the settings ask for."""
        return planned(self.reference, self.sketch, curves, self.example, self._keeper)

    @cached_property
    def _keeper(self) -> Timekeeper | None:
        return keeper_for(self.reference, self.sketch, self.example) if self.settings.is_timed else None

    @property
    def counts_network(self) -> bool:
        """Whether a rate is a share of the network's bytes: of a `size`, and of a `max_drop`."""
        return self.settings.size is not None or self.settings.max_drop is not None

    def at(self, rate: float, curves: Curves, is_timed: bool = True) -> Plan:
        """The ranks at another rate, without a limit on the drop. Unless `is_timed`, there is none on the time, either.

        Raises InfeasibleRateError if the rate cannot be met, InfeasibleTimeError if the time cannot.
        """
        sketch = self.sketch
        if self.counts_network:
            sketch = at_share(sketch, rate)
        else:
            sketch = replace(sketch, settings=replace(self.settings, rate=rate, target_error=None))
        if not is_timed:
            settings = replace(sketch.settings, latency=None, speedup=None, objective=PlanSettings.objective)
            sketch = replace(sketch, settings=settings)
        keeper = self._keeper if sketch.settings.is_timed else None
        return planned(self.reference, sketch, curves, self.example, keeper)

    def within(self, share: float, curves: Curves) -> Plan:
        """The ranks at which the network takes a share of the dense one's time, of any size."""
        sketch = in_time(self.sketch, share)
        return planned(self.reference, sketch, curves, self.example, self._keeper)
