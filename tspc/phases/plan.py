"""Shows the size and the expected error at several rates, before anything is replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tspc.compression.error_curve import Curves
from tspc.compression.integers import state_bytes
from tspc.compression.path_costs import calls, macs_saved
from tspc.compression.plan import Plan
from tspc.deploy import cost
from tspc.errors import InfeasibleRateError
from tspc.phases.phase import ShowingPhase, Work
from tspc.phases.planning import Planning, calibration_samples
from tspc.system.bounds import POSITIVE_SHARE, shown
from tspc.system.launch import is_first
from tspc.terminal.tables import plan_table, rates_table


@dataclass(frozen=True)
class PlanOverview:
    """The rates to compare, besides the run's own rate."""

    rates: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        wrong = [rate for rate in self.rates if rate not in POSITIVE_SHARE]
        return [f"{where}.rates={shown(wrong)}: expected {POSITIVE_SHARE.of('numbers')}"] if wrong else []


def plans_at(
    planning: Planning, overview: PlanOverview, asked: Plan, curves: Curves
) -> dict[float, Plan | InfeasibleRateError]:
    """A plan for the run's own rate and for each other rate, or the error if it cannot be met; largest rate first.

    If nothing is decomposed, there are no other rates.
    """
    plans: dict[float, Plan | InfeasibleRateError] = {asked.rate: asked}
    others = {*overview.rates} - {asked.rate} if planning.settings.decomposes else ()
    for rate in others:
        try:
            plans[rate] = planning.at(rate, curves)
        except InfeasibleRateError as error:
            plans[rate] = error
    return dict(sorted(plans.items(), reverse=True))


def macs_at(
    reference: nn.Module, plans: dict[float, Plan | InfeasibleRateError], example: Tensor | None
) -> dict[float, float]:
    """The network's multiply-accumulates in eval mode, after ÷ before, at each rate that can be met.

    The result is empty without an example, or if the network cannot take it.
    """
    possible = {rate: plan for rate, plan in plans.items() if isinstance(plan, Plan)}
    names = {row.name for plan in possible.values() for row in plan.budgeted}
    if example is None or not (called := calls(reference, names, example)):
        return {}
    before = cost(reference, (example,)).macs
    return {rate: 1 - macs_saved(reference, plan.tensorized, called) / before for rate, plan in possible.items()}


def sizes_of(reference: nn.Module, plan: Plan) -> tuple[int, int]:
    """The bytes of the network's parameters and buffers before, and those expected after."""
    if plan.counts_bytes:
        return plan.network_dense_bytes, plan.network_bytes
    size = state_bytes(reference)
    entry = next(p.element_size() for p in reference.parameters())
    return size, size - entry * (plan.network_dense_params - plan.network_params)


def _run(work: Work) -> None:
    planning, reference, display = work.planning, work.reference, work.context.display
    with calibration_samples(planning.calibration, work.context) as samples:
        curves = planning.curves(samples)
    if not is_first():
        return
    example, asked = planning.example, planning.plan(curves)
    plans = plans_at(planning, work.settings, asked, curves)
    sizes = sizes_of(reference, asked)
    shown = plan_table(asked, *sizes, width=display.console.width)
    display.show(shown, logged=plan_table(asked, *sizes, max_rows=None))
    display.show(rates_table(plans, macs_at(reference, plans, example)))


PHASE = ShowingPhase("plan", PlanOverview, run=_run)
