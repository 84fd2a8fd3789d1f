"""Rate → ranks over the whole network, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tspc import decompositions
from tspc.calibration.samples import Samples
from tspc.compression.allocation import ALLOCATIONS, Candidate, candidate, overall, uniform, without_slower
from tspc.compression.curves import Curves, error_curves
from tspc.compression.path_costs import OBJECTIVES, PATHS, Costs, Size, input_sizes
from tspc.compression.plan import LayerPlan, Plan
from tspc.compression.selection import select
from tspc.decompositions import Auto, Method
from tspc.errors import ConfigError, InfeasibleRateError
from tspc.system.modes import own_modes
from tspc.traversal.blocks import block_of, find_blocks

RATE_DECAYS = ("flat", "linear_inc", "linear_dec")
RATE_SCOPES = ("layers", "network")
RATE = 0.2
"""Where neither a rate nor a target error is given."""
RATE_STEPS = 24
"""Bisections of the rate that meets a target error."""


@own_modes()
def plan(
    model: nn.Module,
    method: str | Method = "tt",
    rate: float | None = None,
    *,
    target_error: float | None = None,
    allocation: str = "global",
    rate_decay: str = "flat",
    rate_scope: str = "layers",
    rank_multiple: int = 1,
    keep_first: bool = True,
    keep_last: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_params: int = 0,
    paths: str = "model",
    objective: str = "parameters",
    samples: Samples | None = None,
    example: Tensor | None = None,
    curves: Curves | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Chooses the ranks of every layer of `model`; changes nothing.

    `rate` (0.2 where none is given) is a ceiling on parameters after ÷ before, in (0, 1]: over the layers that can be
    tensorized with `rate_scope="layers"`, over the whole network with `"network"`. `target_error` asks the inverse
    question, for the smallest rate at which the root mean square of the layers' output errors is expected to be at
    most that.

    `allocation="global"` spends the budget where it lowers the error most, and may keep layers dense;
    `"uniform"` gives every layer the same rate, or with `rate_decay` one that rises (`linear_inc`) or falls
    (`linear_dec`) linearly with the depth of its block, at the same total. A layer whose share is below its
    smallest form takes that, and the others pay. Ranks are multiples of `rank_multiple` (or a mode's whole size).

    The first convolution and the last layer stay dense unless told otherwise, and so do layers whose name
    matches a wildcard in `exclude` or, where it is given, none in `include`, or have fewer than `min_params`
    parameters. Errors are those of the layers' outputs over calibration `samples`, without them of the kernels.
    `curves`, where given, are not measured again.

    Every tensorized layer takes the cheapest of its `paths`, by a cost "model" or as it can "measure", for the input
    sizes that an `example` (images; by default one of the samples) shows. With `objective="latency"` or `"macs"` layers
    of which no path is faster stay dense, for as long as that leaves the others half of their share.

    Raises ConfigError for a wrong argument or a network with nothing to tensorize, InfeasibleRateError if
    the rate cannot be met; the latter names the smallest rate that can.
    """
    check(rate, target_error, allocation, rate_decay, rate_scope, rank_multiple, paths, objective)
    sketch = outline(
        model,
        method,
        rate_scope=rate_scope,
        rank_multiple=rank_multiple,
        keep_first=keep_first,
        keep_last=keep_last,
        include=include,
        exclude=exclude,
        min_params=min_params,
    )
    rate = RATE if rate is None else rate
    if target_error is None:
        sketch.budget(rate)  # a rate that cannot be met is refused before the work
    if curves is None and needs_curves(sketch.method, allocation, target_error):
        curves = error_curves(model, sketch.layers, sketch.method, samples, on_layer=on_layer)
    candidates = [_candidate(layer, sketch.method, curves, rank_multiple) for layer in sketch.chosen]
    names = [layer.name for layer in sketch.chosen]
    weights = dict(zip(names, _weights(model, sketch.chosen, rate_decay), strict=True))
    costs = Costs(paths, objective, _sizes(model, sketch.chosen, samples, example))

    def share_out(those: Sequence[Candidate], budget: int) -> list[LayerPlan]:
        share = [weights[c.layer.name] for c in those]
        ranked = overall(those, budget) if allocation == "global" else uniform(those, share, budget)
        return [costs.best(model.get_submodule(row.name), row) for row in ranked]

    def at(rate: float) -> Plan:
        budget = sketch.budget(rate)
        ranked = share_out(candidates, budget)
        if objective != "parameters":
            is_slow = lambda row: not costs.is_faster(model.get_submodule(row.name), row)  # noqa: E731
            ranked = without_slower(candidates, budget, ranked, share_out, is_slow)
        by_name = {layer.name: layer for layer in ranked}
        final = tuple(by_name.get(layer.name, layer) for layer in sketch.layers)
        return Plan(sketch.method, rate, rate_decay, rate_scope, allocation, final, sketch.network_params, objective)

    return at(rate) if target_error is None else _smallest_plan(at, sketch.smallest_rate, target_error)


def needs_curves(method: Method, allocation: str, target_error: float | None) -> bool:
    """Whether a plan follows from more than the rate."""
    return allocation == "global" or target_error is not None or isinstance(method, Auto)


@dataclass(frozen=True)
class Outline:
    """What is known of a plan before any rank is chosen: the layers, and how many parameters a rate leaves them."""

    method: Method
    layers: tuple[LayerPlan, ...]
    network_params: int
    rate_scope: str
    rank_multiple: int

    @property
    def chosen(self) -> list[LayerPlan]:
        """The layers that share the budget."""
        return [layer for layer in self.layers if layer.reason is None]

    @property
    def _base(self) -> int:
        """Parameters that the rate counts, before."""
        return self.network_params if self.rate_scope == "network" else self._dense

    @property
    def _dense(self) -> int:
        return sum(layer.dense_params for layer in self.chosen)

    @property
    def _least(self) -> int:
        """Parameters that the rate counts with the smallest rank in every layer."""
        smallest = sum(_candidate(layer, self.method, None, self.rank_multiple).minimum for layer in self.chosen)
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


def outline(
    model: nn.Module,
    method: str | Method,
    *,
    rate_scope: str = "layers",
    rank_multiple: int = 1,
    keep_first: bool = True,
    keep_last: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_params: int = 0,
) -> Outline:
    """Finds the layers that can be tensorized; the arguments are those of `plan`, and so are the errors."""
    method = decompositions.resolve(method)
    selected = select(
        model, keep_first=keep_first, keep_last=keep_last, include=include, exclude=exclude, min_params=min_params
    )
    layers = tuple(_smaller(layer, method, rank_multiple) for layer in selected)
    if all(layer.reason is not None for layer in layers):
        kept = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers) or "it has no Conv2d or Linear"
        raise ConfigError([f"the network has no layer to tensorize ({kept})"])
    network_params = sum(p.numel() for p in model.parameters())
    return Outline(method, layers, network_params, rate_scope, rank_multiple)


def _sizes(
    model: nn.Module, layers: Sequence[LayerPlan], samples: Samples | None, example: Tensor | None
) -> dict[str, Size]:
    if example is None and samples is not None:
        example = next(iter(samples))[:1]
    return {} if example is None else input_sizes(model, [layer.name for layer in layers], example)


def check(
    rate: Any,
    target_error: Any,
    allocation: Any,
    rate_decay: Any,
    rate_scope: Any,
    rank_multiple: Any,
    paths: Any = "model",
    objective: Any = "parameters",
) -> None:
    """Raises ConfigError, with every problem, for arguments of `plan` that are out of range."""
    problems = [] if rate is None or _is_share(rate) else [f"rate={rate!r}: expected a number above 0 and at most 1"]
    if rate is not None and target_error is not None:
        problems.append(f"rate={rate!r} and target_error={target_error!r} are two goals; leave one of them out")
    if target_error is not None and not _is_share(target_error):
        problems.append(f"target_error={target_error!r}: expected a number above 0 and at most 1, or null")
    for key, value, options in (
        ("allocation", allocation, ALLOCATIONS),
        ("rate_decay", rate_decay, RATE_DECAYS),
        ("rate_scope", rate_scope, RATE_SCOPES),
        ("paths", paths, PATHS),
        ("objective", objective, OBJECTIVES),
    ):
        if value not in options:
            problems.append(f"{key}={value!r}: choose one of {', '.join(options)}")
    problems += conflicts(allocation, rate_decay)
    if isinstance(rank_multiple, bool) or not isinstance(rank_multiple, int) or rank_multiple < 1:
        problems.append(f"rank_multiple={rank_multiple!r}: expected a whole number of at least 1")
    if problems:
        raise ConfigError(problems)


def _whole_share(rate: float, base: int) -> int:
    """The largest number that, divided by `base`, is at most the rate; 29 for 0.29 of 100, though 0.29 · 100 < 29."""
    near = math.floor(rate * base)
    return next(number for number in (near + 1, near, near - 1) if number / base <= rate)


def conflicts(allocation: Any, rate_decay: Any) -> list[str]:
    """What is wrong with an allocation and a decay together."""
    if rate_decay in RATE_DECAYS[1:] and allocation == "global":
        return [f"rate_decay={rate_decay} prescribes each layer's share: it needs allocation=uniform"]
    return []


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _candidate(layer: LayerPlan, method: Method, curves: Curves | None, multiple: int) -> Candidate:
    found = candidate(layer, method, curves, multiple)
    assert found is not None
    return found


def _smaller(layer: LayerPlan, method: Method, multiple: int) -> LayerPlan:
    """The layer, with a reason to stay dense if even its smallest form would not make it smaller."""
    if layer.reason is not None or candidate(layer, method, None, multiple) is not None:
        return layer
    forms = method.candidates(layer.shape)
    minimum = min(form.min_params(layer.shape, multiple) for form in forms) + layer.bias_params
    rank = "rank 1" if multiple == 1 else f"rank {multiple}"
    return replace(layer, reason=f"{rank} needs {minimum} parameters, no fewer than dense")


def _weights(model: nn.Module, layers: list[LayerPlan], rate_decay: str) -> list[float]:
    """Relative rate of each layer: 1 for all, or the number of its block counted from either end."""
    if rate_decay == "flat":
        return [1.0] * len(layers)
    blocks = find_blocks(model, [layer.name for layer in layers])
    depths = [block_of(layer.name, blocks) or 0 for layer in layers]
    return [float(d + 1 if rate_decay == "linear_inc" else len(blocks) - d) for d in depths]


def _smallest_plan(at: Callable[[float], Plan], low: float, target_error: float) -> Plan:
    """The plan with the smallest rate, from `low` on, whose expected error is at most the target."""
    best, high = at(1.0), 1.0
    if _expected(best) > target_error:
        least = _expected(best)
        message = f"target_error={target_error} cannot be met: at rate 1 it is {least:.4g}; allocation=global can"
        raise ConfigError([message])
    if _expected(smallest := at(low)) <= target_error:
        return smallest
    for _ in range(RATE_STEPS):
        middle = (low + high) / 2
        tried = at(middle)
        if _expected(tried) <= target_error:
            best, high = tried, middle
        else:
            low = middle
    return best


def _expected(plan: Plan) -> float:
    assert plan.output_error is not None, "a target error needs curves"
    return plan.output_error
