"""Phase 0: dense layers out, tensorized layers in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import tensorized
from tspc.compression.curves import Curves, error_curves
from tspc.compression.plan import LayerPlan, Plan
from tspc.decompositions import Method, Metric
from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.phases.spectra import Spectrum, spectra_of


def example_input(model: nn.Module, network: NetworkSpec) -> Tensor | None:
    """An image of the size that the network takes, empty; None if that is not known."""
    if network.image_size is None:
        return None
    parameter = next(model.parameters(), torch.zeros(()))
    return parameter.new_zeros(1, network.in_channels, network.image_size, network.image_size)


@contextmanager
def calibration_samples(calibration: Calibration, context: Context) -> Iterator[Samples | None]:
    """Images of the training split; None if there is no data, or none are asked for."""
    if context.data is None or calibration.samples == 0:
        yield None
        return
    batches = context.data.calibration_batches(calibration.samples, calibration.batch_size, context.device)
    with Samples(batches, calibration, context.device) as samples:
        yield samples


def measure_curves(
    reference: nn.Module, layers: Sequence[LayerPlan], method: Method, samples: Samples | None, context: Context
) -> Curves:
    """What every layer would lose at any size."""
    total = sum(layer.reason is None for layer in layers)
    with context.display.bar(f"{'plan':<9} {total} layers", total) as bar:
        done = 0

        def on_layer(name: str) -> None:
            nonlocal done
            done += 1
            bar.advance(done, name)

        return error_curves(reference, layers, method, samples, on_layer=on_layer)


def decompose(
    reference: nn.Module, plan: Plan, samples: Samples | None, context: Context
) -> tuple[nn.Module, Plan, list[Spectrum]]:
    """A tensorized copy of `reference`, the plan with the errors of each layer, and the layers' spectra."""
    spectra: list[Spectrum] = []
    total = len(plan.tensorized)
    with context.display.bar(f"{'decompose':<9} {total} layers", total) as bar:
        done = 0

        def on_layer(layer: LayerPlan, kernel: Tensor, metric: Metric | None) -> None:
            nonlocal done
            if layer.method is not None:
                spectra.extend(spectra_of(layer, kernel, metric))
                done += 1
            shown = layer.error if layer.output_error is None else layer.output_error
            bar.advance(done, f"{layer.name}  error {shown or math.nan:.3f}")
            errors = {"error": layer.error, "output_error": layer.output_error}
            context.note({"phase": "decompose", "layer": layer.name, "parameters": layer.params} | errors)

        model, plan = tensorized(reference, plan, samples, on_layer)
    return model, plan, spectra
