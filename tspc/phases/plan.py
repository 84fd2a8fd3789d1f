"""What rates would cost, before anything is replaced."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from tspc.compression.curves import Curves
from tspc.compression.path_costs import calls, macs_saved
from tspc.compression.plan import Plan
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.deploy import cost
from tspc.errors import InfeasibleRateError
from tspc.system.bounds import POSITIVE_SHARE, shown


@dataclass(frozen=True)
class PlanOverview:
    """The rates to compare, beside the one asked for."""

    rates: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        wrong = [rate for rate in self.rates if rate not in POSITIVE_SHARE]
        return [f"{where}.rates={shown(wrong)}: expected {POSITIVE_SHARE.of('numbers')}"] if wrong else []


def plans_at(
    reference: nn.Module,
    settings: PlanSettings,
    overview: PlanOverview,
    asked: Plan,
    curves: Curves,
    example: Tensor | None = None,
) -> dict[float, Plan | InfeasibleRateError]:
    """The plan asked for and one for every other rate, largest first, or why there is none."""
    plans: dict[float, Plan | InfeasibleRateError] = {asked.rate: asked}
    for rate in {*overview.rates} - {asked.rate}:
        try:
            at_rate = dataclasses.replace(settings, rate=rate, target_error=None)
            plans[rate] = plan(reference, at_rate, curves=curves, example=example)
        except InfeasibleRateError as error:
            plans[rate] = error
    return dict(sorted(plans.items(), reverse=True))


def macs_at(
    reference: nn.Module, plans: dict[float, Plan | InfeasibleRateError], example: Tensor | None
) -> dict[float, float]:
    """The network's multiply-accumulates in eval mode, after ÷ before, at each rate that can be met.

    Empty without an example that the network takes.
    """
    possible = {rate: plan for rate, plan in plans.items() if isinstance(plan, Plan)}
    names = {row.name for plan in possible.values() for row in plan.budgeted}
    if example is None or not (called := calls(reference, names, example)):
        return {}
    before = cost(reference, (example,)).macs
    return {rate: 1 - macs_saved(reference, plan.tensorized, called) / before for rate, plan in possible.items()}
