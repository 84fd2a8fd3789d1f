"""The layers of a network that a plan is about, and what a rate leaves them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from tspc.compression.allocation import Candidate, candidate
from tspc.compression.error_curve import Curves
from tspc.compression.plan import LayerPlan
from tspc.compression.selection import FilterFn, select
from tspc.compression.settings import PlanSettings
from tspc.decompositions import Method
from tspc.errors import ConfigError, InfeasibleRateError


@dataclass(frozen=True)
class Outline:
    """What is known of a plan before any rank is chosen: the layers, and how many parameters a rate leaves them."""

    settings: PlanSettings
    layers: tuple[LayerPlan, ...]
    network_params: int

    @property
    def chosen(self) -> list[LayerPlan]:
        """The layers that share the budget."""
        return [layer for layer in self.layers if layer.reason is None]

    def candidates(self, curves: Curves | None) -> list[Candidate]:
        """What each of these layers may become, with its curves where they are known."""
        found = [candidate(x, self.settings.method, curves, self.settings.rank_multiple) for x in self.chosen]
        return [one for one in found if one is not None]  # all of them: `outline` keeps the others dense

    @property
    def _base(self) -> int:
        """Parameters that the rate counts, before."""
        return self.network_params if self.settings.rate_scope == "network" else self._dense

    @property
    def _dense(self) -> int:
        return sum(layer.dense_params for layer in self.chosen)

    @property
    def _least(self) -> int:
        """Parameters that the rate counts with the smallest rank in every layer."""
        smallest = sum(candidate.minimum for candidate in self.candidates(None))
        return self._base - self._dense + smallest

    @property
    def smallest_rate(self) -> float:
        """The smallest feasible rate; rounded up, so that it is itself feasible."""
        return -(-self._least * 10_000 // self._base) / 10_000

    def budget(self, rate: float) -> int:
        """Parameters that these layers together may have. Raises InfeasibleRateError if they cannot have so few."""
        counted = _whole_share(rate, self._base)
        if counted < self._least:
            raise InfeasibleRateError(
                f"rate={rate} cannot be met: the smallest rank in every layer already needs {self._least:,} of "
                f"{self._base:,} parameters; the smallest feasible rate for this method and network is "
                f"{self.smallest_rate}",
                self.smallest_rate,
            )
        return counted - (self._base - self._dense)


def outline(model: nn.Module, settings: PlanSettings, filter_fn: FilterFn | None = None) -> Outline:
    """Finds the layers that can be tensorized. Raises ConfigError if there is none, and what `select` raises."""
    selected = select(model, settings.selection, filter_fn)
    layers = tuple(_smaller(layer, settings.method, settings.rank_multiple) for layer in selected)
    if all(layer.reason is not None for layer in layers):
        kept = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers) or "it has no Conv2d or Linear"
        raise ConfigError([f"the network has no layer to tensorize ({kept})"])
    return Outline(settings, layers, sum(p.numel() for p in model.parameters()))


def _whole_share(rate: float, base: int) -> int:
    """The largest number that, divided by `base`, is at most the rate; 29 for 0.29 of 100, though 0.29 · 100 < 29."""
    near = math.floor(rate * base)
    return next(number for number in (near + 1, near, near - 1) if number / base <= rate)


def _smaller(layer: LayerPlan, method: Method, multiple: int) -> LayerPlan:
    """The layer, with a reason to stay dense if even its smallest form would not make it smaller."""
    if layer.reason is not None or candidate(layer, method, None, multiple) is not None:
        return layer
    forms = method.candidates(layer.shape)
    minimum = min(form.min_params(layer.shape, multiple) for form in forms) + layer.bias_params
    rank = "rank 1" if multiple == 1 else f"rank {multiple}"
    return replace(layer, reason=f"{rank} needs {minimum} parameters, no fewer than dense")
