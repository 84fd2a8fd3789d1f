"""Shows what can be had, before anything is replaced: sizes, times and expected errors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tspc.compression.error_curve import Curves
from tspc.compression.goals import SPEEDUPS
from tspc.compression.integers import state_bytes
from tspc.compression.path_costs import calls, macs_saved
from tspc.compression.plan import Plan
from tspc.data import Given, ModelInputs
from tspc.deploy import cost
from tspc.errors import InfeasibleRateError
from tspc.layers.unpacking import unpacked
from tspc.phases.frontier import FILE, by_size, by_time, frontier_of, keeper_of
from tspc.phases.inputs import Example, in_order
from tspc.phases.phase import ShowingPhase, Work
from tspc.phases.planning import Planning, calibration_samples
from tspc.store.files import make_folder, write_json
from tspc.system.bounds import POSITIVE_SHARE, shown
from tspc.system.launch import is_first
from tspc.terminal.tables import plan_table, rates_table, times_table


@dataclass(frozen=True)
class PlanOverview:
    """The rates to compare, besides the run's own rate, and the speedups if a runtime is named."""

    rates: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)
    speedups: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        found = []
        for key, values, allowed in (("rates", self.rates, POSITIVE_SHARE), ("speedups", self.speedups, SPEEDUPS)):
            wrong = [value for value in values if value not in allowed]
            found += [f"{where}.{key}={shown(wrong)}: expected {allowed.of('numbers')}"] if wrong else []
        return found


def plans_at(
    planning: Planning, overview: PlanOverview, asked: Plan | None, curves: Curves
) -> dict[float, Plan | InfeasibleRateError]:
    """A plan for the run's own rate and for each other rate, or the error if it cannot be met; largest rate first.

    If nothing is decomposed, there are no other rates.
    """
    plans: dict[float, Plan | InfeasibleRateError] = {} if asked is None else {asked.rate: asked}
    others = {*overview.rates} - {*plans} if planning.settings.decomposes else ()
    for rate in others:
        try:
            plans[rate] = planning.at(rate, curves, is_timed=False)
        except InfeasibleRateError as error:
            plans[rate] = error
    return dict(sorted(plans.items(), reverse=True))


def macs_at(
    reference: nn.Module, plans: dict[float, Plan | InfeasibleRateError], example: Given | None
) -> dict[float, float]:
    """The network's multiply-accumulates in eval mode, after ÷ before, at each rate that can be met.

    The result is empty without an example, or if the network cannot take it.
    """
    possible = {rate: plan for rate, plan in plans.items() if isinstance(plan, Plan)}
    names = {row.name for plan in possible.values() for row in plan.budgeted}
    if example is None or not (called := calls(reference, names, example)):
        return {}
    tried = Example(example if isinstance(example, ModelInputs) else (example,), "an input")
    networks, tensors = in_order({"dense": reference}, tried)
    before = cost(networks["dense"], tensors).macs
    return {rate: 1 - macs_saved(reference, plan.tensorized, called) / before for rate, plan in possible.items()}


def sizes_of(reference: nn.Module, plan: Plan) -> tuple[int, int]:
    """The bytes of the network's parameters and buffers before, and those expected after."""
    if plan.counts_bytes:
        return plan.network_dense_bytes, plan.network_bytes
    size = state_bytes(reference)
    entry = next(p.element_size() for p in reference.parameters())
    return size, size - entry * (plan.network_dense_params - plan.network_params)


def _run(work: Work) -> None:
    with unpacked(work.reference):
        _show(work)


def _show(work: Work) -> None:
    planning, reference, display = work.planning, work.reference, work.context.display
    with calibration_samples(planning.calibration, work.context) as samples:
        curves = planning.curves(samples)
    if not is_first():
        return
    example, asked = planning.example, None
    if planning.settings.max_drop is None:  # its plan is found by trying networks
        asked = planning.plan(curves)
        sizes = sizes_of(reference, asked)
        table = plan_table(asked, *sizes, width=display.console.width)
        display.show(table, logged=plan_table(asked, *sizes, max_rows=None))
    plans = plans_at(planning, work.settings, asked, curves)
    keeper = keeper_of(planning)
    sized = by_size(planning, plans, keeper)
    display.show(
        rates_table(plans, macs_at(reference, plans, example), {x.rate: x.seconds for x in sized if x.seconds})
    )
    timed = [] if keeper is None else by_time(planning, work.settings.speedups, curves, keeper)
    if keeper is not None:
        display.show(times_table(timed, keeper.watch.dense_seconds, planning.settings.runtime))
    make_folder(work.folder)
    write_json(work.folder / FILE, frontier_of(planning, sized, timed, keeper))


PHASE = ShowingPhase("plan", PlanOverview, run=_run)
