"""Phase 0: replaces dense layers by tensorized layers."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from tspc.calibration.samples import Samples
from tspc.compression import fastest
from tspc.compression.apply import tensorized, to_fit
from tspc.compression.error_curve import Curves
from tspc.compression.integers import state_bytes
from tspc.compression.limits import pilot_of
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.progress import FIT, work_on
from tspc.compression.settings import Selection
from tspc.compression.smallest import Search
from tspc.decompositions import Metric
from tspc.phases.context import Context
from tspc.phases.judging import Judging
from tspc.phases.phase import NetworkPhase, Work
from tspc.phases.planning import Planning, calibration_samples
from tspc.phases.spectra import Spectrum, spectra_of
from tspc.store.files import write_json
from tspc.system import processes
from tspc.system.launch import is_first
from tspc.system.tally import counting
from tspc.terminal.tables import plan_table


def decompose(
    reference: nn.Module, plan: Plan, samples: Samples | None, context: Context
) -> tuple[nn.Module, Plan, list[Spectrum]]:
    """A tensorized copy of `reference`, the plan with the errors of each layer, and the layers' spectra."""
    spectra: list[Spectrum] = []
    total = FIT * sum(work_on(layer.kernel_params) for layer in to_fit(reference, plan, samples))
    with context.tally("decompose", f"{len(plan.tensorized)} layers", total) as tally, counting(samples, tally):

        def on_layer(layer: LayerPlan, kernel: Tensor, metric: Metric | None) -> None:
            if layer.method is not None:
                spectra.extend(spectra_of(layer, kernel, metric))
            shown = layer.error if layer.output_error is None else layer.output_error
            tally.add(f"{layer.name}  error {shown or math.nan:.3f}", FIT * work_on(layer.kernel_params))
            errors = {"error": layer.error, "output_error": layer.output_error}
            context.note({"phase": "decompose", "layer": layer.name, "parameters": layer.params} | errors)

        model, plan = tensorized(reference, plan, samples, on_layer)
    return model, plan, spectra


def smallest(
    reference: nn.Module,
    planning: Planning,
    judging: Judging,
    curves: Curves,
    samples: Samples | None,
    context: Context,
) -> tuple[nn.Module, Plan, list[Spectrum]]:
    """The smallest network that keeps the limit on the drop, as `decompose` returns it. Raises what `Search` raises."""
    spectra: dict[nn.Module, list[Spectrum]] = {}

    def make(plan: Plan) -> tuple[nn.Module, Plan]:
        model, done, spectra[model] = decompose(reference, plan, samples, context)
        return model, done

    say = lambda line: context.display.line(f"decompose  {line}")  # noqa: E731
    limit, sketch = judging.limit(planning.sketch), planning.sketch
    judging.held_out.check(limit.drop, pilot_of(judging.held_out.count))
    if judging.is_trained and not judging.knows:
        say("no earlier run tells how much of a drop this training gives back: the limit is kept without it")
    plan_at = lambda share: planning.at(share, curves)  # noqa: E731
    expected = lambda share: planning.at(share, curves, is_timed=False).output_error  # noqa: E731
    search = Search(plan_at, make, judging.held_out, limit, sketch.smallest_rate, say, expected)
    one = fastest.run(search, lambda share: planning.within(share, curves))
    for each in search.tried.values():
        context.note({"phase": "decompose", "event": "tried"} | each.to_dict())
    return one.network, replace(one.plan, judged=search.judged(one)), spectra[one.network]


def _run(work: Work) -> tuple[nn.Module, dict[str, Any] | None]:
    planning, display = work.planning, work.context.display
    with calibration_samples(planning.calibration, work.context) as samples:
        curves = planning.curves(samples) if planning.settings.needs_curves else None
        if not is_first():
            return work.reference, None
        # The layers correct each other's errors one after the other, so the other processes cannot help.
        with processes.alone():
            if work.judging is None or curves is None:
                model, done, spectra = decompose(work.reference, planning.plan(curves), samples, work.context)
            else:
                model, done, spectra = smallest(work.reference, planning, work.judging, curves, samples, work.context)
    write_json(work.folder / "spectra.json", [asdict(spectrum) for spectrum in spectra])
    sizes = state_bytes(work.reference), state_bytes(model)
    shown = plan_table(done, *sizes, width=display.console.width)
    display.show(shown, logged=plan_table(done, *sizes, max_rows=None))
    return model, done.to_dict()


PHASE = NetworkPhase("decompose", Selection, run=_run, hands_over=True)
