"""What rates would cost, before anything is replaced."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from tspc.curves import Curves
from tspc.deploy import cost
from tspc.errors import InfeasibleRateError
from tspc.paths import input_sizes, macs_saved
from tspc.phases.decompose import PlanRequest
from tspc.plans import Plan


@dataclass(frozen=True)
class PlanOverview:
    """The rates to compare, beside the one asked for."""

    rates: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        wrong = [rate for rate in self.rates if not 0 < rate <= 1]
        return [f"{where}.rates={wrong}: expected numbers above 0 and at most 1"] if wrong else []


def plans_at(
    reference: nn.Module,
    request: PlanRequest,
    overview: PlanOverview,
    curves: Curves,
    example: Tensor | None = None,
) -> dict[float, Plan | InfeasibleRateError]:
    """A plan for every rate, largest first, or why there is none."""
    rates = {request.rate, *overview.rates} if request.target_error is None else set(overview.rates)
    plans: dict[float, Plan | InfeasibleRateError] = {}
    for rate in sorted(rates, reverse=True):
        try:
            plans[rate] = dataclasses.replace(request, rate=rate, target_error=None).plan(reference, curves, example)
        except InfeasibleRateError as error:
            plans[rate] = error
    return plans


def operations_at(
    reference: nn.Module, plans: dict[float, Plan | InfeasibleRateError], example: Tensor | None
) -> dict[float, float]:
    """Multiply-adds of the network after ÷ before, at each rate that can be met; empty without an example."""
    if example is None:
        return {}
    possible = {rate: plan for rate, plan in plans.items() if isinstance(plan, Plan)}
    sizes = input_sizes(reference, {row.name for plan in possible.values() for row in plan.tensorized}, example)
    before = cost(reference, (example,)).macs if sizes else 0
    if not before:  # the network does not take the example
        return {}
    return {rate: 1 - macs_saved(reference, plan.tensorized, sizes) / before for rate, plan in possible.items()}
