"""Compresses a network in one call: plans, and applies the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from tspc.calibration.samples import Calibration, Samples, kept
from tspc.compression import fastest
from tspc.compression.apply import apply_, tensorized, to_fit
from tspc.compression.curves import error_curves
from tspc.compression.goals import bits_of, share_of
from tspc.compression.limits import Limit, pilot_of
from tspc.compression.outline import Outline, outline
from tspc.compression.plan import BYTES
from tspc.compression.planning import keeper_for, plan, planned, shown_by
from tspc.compression.progress import FIT, progress_bar, work_on
from tspc.compression.selection import FilterFn
from tspc.compression.settings import PlanSettings
from tspc.compression.smallest import Search, Tried
from tspc.data.model_inputs import Given
from tspc.decompositions import Method
from tspc.errors import ConfigError
from tspc.layers.dense import has_inputs, kind_of
from tspc.layers.replacing import warn_of_parameter_hooks
from tspc.layers.unpacking import owner_in, pack_, unpack_
from tspc.models.lazy import require_sizes
from tspc.system import processes
from tspc.system.modes import own_modes
from tspc.system.tally import counting
from tspc.training.held_out import HeldOut, reader_of
from tspc.training.metrics import metric_of
from tspc.traversal.copying import copied


@own_modes()
def compress(
    model: nn.Module,
    method: str | Method | PlanSettings = "tt",
    rate: float | None = None,
    *,
    calibration: Given | Iterable[Any] | Samples | None = None,
    settings: Calibration | None = None,
    held_out: Iterable[Any] | None = None,
    metric: str | Callable[..., Any] = "top1",
    filter_fn: FilterFn | None = None,
    example: Given | Mapping[str, Any] | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
    progress: bool = False,
    spread: bool = False,
    **options: Any,
) -> nn.Module:
    """A compressed copy of `model`; the arguments are those of `tspc.plan`. `progress` shows a bar with the time left.

    With `calibration` data layers are fitted to their outputs, else to their weights. `on_layer` is called with the
    name of a layer after its errors were measured for the plan, and again after it was fitted. A layer with thousands
    of inputs takes seconds.

    With `spread` all processes of `torch.distributed` call this together, with the same network and the same data, each
    on its own device. They share the work on layers that do not depend on each other, and all get the same network.

    With `max_drop` the result is that of `smallest`, which `held_out` and `metric` are for.

    Raises what `plan`, `apply_` and `smallest` raise. With `spread` an error in one process is raised in all.
    """
    asked = PlanSettings.of(method, rate, **options)
    if asked.max_drop is not None:
        if spread:
            raise ConfigError(["spread=True has no effect with max_drop; leave it out"])
        shared = {"calibration": calibration, "settings": settings, "filter_fn": filter_fn, "example": example}
        return smallest(model, asked, held_out=held_out, metric=metric, on_layer=on_layer, **shared).network
    if held_out is not None:
        raise ConfigError(["held_out has an effect only with max_drop; leave it out"])
    if metric_of(metric).name != "top1":
        raise ConfigError([f"metric={metric_of(metric).name} has an effect only with max_drop; leave it out"])
    require_sizes(model)
    small = copied(model)
    originals = unpack_(small)
    # The predicate is asked about the caller's modules, which it may know.
    known = dict(model.named_modules())
    chooses = filter_fn and (lambda name, copy: filter_fn(name, cast(nn.Module, known.get(name, copy))))
    layers = {name: layer for name, layer in small.named_modules() if kind_of(layer)}
    sizes = {name: work_on(sum(p.numel() for p in layer.parameters())) for name, layer in layers.items()}
    counted = kind_of if asked.widths.offers_dense or asked.ranks_tables else has_inputs
    total = (FIT + asked.needs_curves) * sum(size for name, size in sizes.items() if counted(layers[name]))
    with (
        processes.sharing(spread),
        progress_bar(total, progress) as tally,
        kept(calibration, settings, model, tally) as samples,
        counting(samples, tally),
    ):

        def done(name: str, times: int = 1) -> None:
            tally.add(name, times * sizes[name])
            on_layer(name)

        ranks = plan(small, asked, calibration=samples, filter_fn=chooses, example=example, on_layer=done)
        warn_of_parameter_hooks({layer.name: owner_in(model, layer.name) for layer in ranks.tensorized})
        tally.total = tally.done + FIT * sum(sizes[layer.name] for layer in to_fit(small, ranks, samples))
        apply_(small, ranks, samples, lambda layer, *fitted: done(layer.name, FIT))
    pack_(small, originals)
    return small


@own_modes()
def smallest(
    model: nn.Module,
    method: str | Method | PlanSettings = "auto",
    *,
    held_out: Iterable[Any] | None,
    metric: str | Callable[..., Any] = "top1",
    calibration: Given | Iterable[Any] | Samples | None = None,
    settings: Calibration | None = None,
    filter_fn: FilterFn | None = None,
    example: Given | Mapping[str, Any] | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Tried:
    """The smallest network, in bytes, that loses at most `max_drop` points of a metric on held-out inputs.

    `held_out` are batches (inputs, targets), or dicts with labels, that the network was not fitted to; best of all, the
    reference was not trained on them either. On its own training data a reference is better than on new data, and
    compression takes that away: there the drop is larger than on new data, and the network becomes less small than it
    could. The drop is at most `max_drop` with the `confidence` that is asked for, if the inputs are a fair sample of
    those to come.

    `metric` is "top1", "top5", "agreement", "cosine", "perplexity", "mse", or a function (model, batches) → number,
    higher is better. A point is 0.01 of a share, else 1. The other arguments are those of `tspc.plan`. `say` gets a
    line about each network that was tried.

    Raises ConfigError if the drop cannot be shown to be so small, and DataError without enough held-out inputs.
    """
    asked = PlanSettings.of(method, **options)
    if asked.max_drop is None:
        raise ConfigError(["max_drop is missing: say how many points the network may lose"])
    if held_out is None:
        raise ConfigError([f"max_drop={asked.max_drop:g} needs held_out=, batches of inputs and targets that judge"])
    judged = metric_of(metric)
    require_sizes(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    judge = HeldOut(model, judged, *reader_of(held_out, device, model, judged.needs_labels), device)
    sketch = outline(model, asked, filter_fn)
    limit = limit_of(asked, sketch)
    limit.check(judge.count, judge.has_counts)
    judge.check(asked.max_drop, pilot_of(judge.count))
    with kept(calibration, settings, model) as samples:
        curves = error_curves(model, sketch.layers, asked.method, samples, widths=asked.widths, on_layer=on_layer)
        example = shown_by(model, samples, example)
        keeper = keeper_for(model, sketch, example) if asked.is_timed else None
        plan_at = lambda share: planned(model, at_share(sketch, share), curves, example, keeper)  # noqa: E731
        plan_in = lambda share: planned(model, in_time(sketch, share), curves, example, keeper)  # noqa: E731
        make = lambda plan: tensorized(model, plan, samples)  # noqa: E731
        untimed = replace(sketch, settings=replace(asked, latency=None, speedup=None))
        expected = lambda share: planned(model, at_share(untimed, share), curves, example).output_error  # noqa: E731
        search = Search(plan_at, make, judge, limit, sketch.smallest_rate, say, expected)
        found = fastest.run(search, plan_in)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in found.network.named_modules():
        module.training = modes.get(name, model.training)
    return found


def at_share(sketch: Outline, share: float) -> Outline:
    """The outline for a size as a share of the network's bytes, in the place of a limit on the drop."""
    settings = replace(sketch.settings, rate=None, target_error=None, max_drop=None, size=f"{share:.10g}")
    return replace(sketch, settings=settings)


def in_time(sketch: Outline, share: float) -> Outline:
    """The outline for a share of the dense network's time, in the place of all limits; any size."""
    settings = replace(sketch.settings, max_drop=None, size=None, latency=None, speedup=1 / share)
    return replace(sketch, settings=replace(settings, bits=bits_of(sketch.settings.identity), rate_unit=BYTES))


def limit_of(asked: PlanSettings, sketch: Outline, **trained: Any) -> Limit:
    """The limit that a search keeps, from the settings; `trained` are the fields about training."""
    assert asked.max_drop is not None
    share = 1.0 if asked.size is None else share_of(asked.size, sketch.network_bytes)
    return Limit(asked.max_drop, 1 - asked.terms.confidence, asked.terms.images, share, **trained)
