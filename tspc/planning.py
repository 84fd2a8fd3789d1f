"""Rate → ranks over the whole network, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from torch import nn

from tspc import decompositions
from tspc.blocks import block_of, find_blocks
from tspc.decompositions import Decomposition, Rank, Shape
from tspc.errors import ConfigError, InfeasibleRateError
from tspc.layers import tensorized_layers

RATE_DECAYS = ("flat", "linear_inc", "linear_dec")
RATE_SCOPES = ("layers", "network")
BISECTIONS = 32


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one convolution or dense layer.

    Parameters count the kernel (or its factors) and the bias. `method` and `rank` are None where the layer
    stays dense, and `reason` says why. `error` is ‖K − K̂‖/‖K‖, known once the layer is decomposed.
    """

    name: str
    kind: str
    shape: Shape
    dense_params: int
    params: int
    method: Decomposition | None = None
    rank: Rank | None = None
    reason: str | None = None
    error: float | None = None

    @property
    def form(self) -> str:
        """What the layer becomes: method and ranks, or why it stays dense."""
        if self.method is None or self.rank is None:
            return f"dense: {self.reason}"
        return f"{self.method.name} {', '.join(map(str, self.rank))}"

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"{self.name} {self.kind} {shape}: {self.form}, {self.dense_params:,} → {self.params:,}"

    def to_dict(self) -> dict[str, Any]:
        data = {k: getattr(self, k) for k in ("name", "kind", "dense_params", "params", "reason", "error")}
        rank = None if self.rank is None else list(self.rank)
        method = None if self.method is None else self.method.to_dict()
        return data | {"shape": list(self.shape), "rank": rank, "method": method}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        method = None if data["method"] is None else decompositions.from_dict(data["method"])
        rank = None if data["rank"] is None else tuple(data["rank"])
        return cls(**data | {"shape": tuple(data["shape"]), "rank": rank, "method": method})


@dataclass(frozen=True)
class Plan:
    """Ranks for a whole network at one rate. `layers` also lists the layers that stay dense."""

    method: Decomposition
    rate: float
    rate_decay: str
    rate_scope: str
    layers: tuple[LayerPlan, ...]
    network_dense_params: int

    @property
    def tensorized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.method is not None)

    @property
    def dense_params(self) -> int:
        """Parameters of the tensorized layers before."""
        return sum(layer.dense_params for layer in self.tensorized)

    @property
    def params(self) -> int:
        """Parameters of the tensorized layers after."""
        return sum(layer.params for layer in self.tensorized)

    @property
    def network_params(self) -> int:
        """Parameters of the whole network after."""
        return self.network_dense_params - self.dense_params + self.params

    @property
    def rate_reached(self) -> float:
        """Parameters after ÷ before, over what `rate_scope` counts; never above `rate`."""
        if self.rate_scope == "network":
            return self.network_params / self.network_dense_params
        return self.params / self.dense_params

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), f"total: {self.dense_params:,} → {self.params:,} parameters"])

    def to_dict(self) -> dict[str, Any]:
        data = {k: getattr(self, k) for k in ("rate", "rate_decay", "rate_scope", "network_dense_params")}
        return data | {"method": self.method.to_dict(), "layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        layers = tuple(LayerPlan.from_dict(layer) for layer in data["layers"])
        return cls(**data | {"method": decompositions.from_dict(data["method"]), "layers": layers})


def plan(
    model: nn.Module,
    method: str | Decomposition = "tt",
    rate: float = 0.2,
    *,
    rate_decay: str = "flat",
    rate_scope: str = "layers",
    keep_first: bool = True,
    keep_last: bool = True,
    exclude: Sequence[str] = (),
) -> Plan:
    """Chooses the ranks of every layer of `model`; changes nothing.

    `rate` is a ceiling on parameters after ÷ before, in (0, 1]: over the tensorized layers with
    `rate_scope="layers"`, over the whole network with `"network"`. `rate_decay` shares the same total out
    over the network's blocks: the same rate for all (`flat`), or a rate that rises (`linear_inc`) or falls
    (`linear_dec`) linearly with depth. A layer whose share is below its rank-1 form takes rank 1, and the
    others pay. The first convolution and the last layer stay dense unless told otherwise, and so do layers
    whose name matches a wildcard in `exclude`.

    Raises ConfigError for a wrong argument or a network with nothing to tensorize, InfeasibleRateError if
    the rate cannot be met; the latter names the smallest rate that can.
    """
    problems = [] if _is_rate(rate) else [f"rate={rate!r}: expected a number above 0 and at most 1"]
    for key, value, options in (("rate_decay", rate_decay, RATE_DECAYS), ("rate_scope", rate_scope, RATE_SCOPES)):
        if value not in options:
            problems.append(f"{key}={value!r}: choose one of {', '.join(options)}")
    if problems:
        raise ConfigError(problems)
    method = decompositions.resolve(method)
    layers = [_select(layer, method) for layer in _candidates(model, keep_first, keep_last, exclude)]
    network_params = sum(p.numel() for p in model.parameters())
    chosen = [layer for layer in layers if layer.reason is None]
    if not chosen:
        kept = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers) or "it has no Conv2d or Linear"
        raise ConfigError([f"the network has no layer to tensorize ({kept})"])
    budget = _budget(chosen, rate, rate_scope, network_params)
    ranked = {layer.name: layer for layer in _allocate(chosen, _weights(model, chosen, rate_decay), budget)}
    final = tuple(ranked.get(layer.name, layer) for layer in layers)
    return Plan(method, rate, rate_decay, rate_scope, final, network_params)


def _is_rate(rate: Any) -> bool:
    return isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= 1


def _candidates(model: nn.Module, keep_first: bool, keep_last: bool, exclude: Sequence[str]) -> list[LayerPlan]:
    """Every convolution and dense layer; `reason` is set where it must or shall stay dense."""
    done = next(iter(tensorized_layers(model)), None)
    if done is not None:
        raise ConfigError([f"the network is compressed already (layer {done}); give the original one"])
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    shared = _shared_weights(model)
    first = next((n for n, m in modules.items() if not isinstance(m, nn.Linear)), None)
    last = next(reversed(modules), None)
    idle = [pattern for pattern in exclude if not any(fnmatchcase(name, pattern) for name in modules)]
    if idle:
        raise ConfigError(
            [f"exclude={idle}: no convolution or dense layer has such a name; there are {_some(modules)}"]
        )
    layers = []
    for name, module in modules.items():
        reason = _why_dense(module)
        if name in shared:
            reason = "its weight is shared with another layer"
        elif keep_first and name == first:
            reason = "first convolution"
        elif keep_last and name == last:
            reason = "final layer"
        elif any(fnmatchcase(name, pattern) for pattern in exclude):
            reason = "excluded"
        params = sum(p.numel() for p in module.parameters(recurse=False))
        shape = tuple(module.weight.shape)
        layers.append(LayerPlan(name, type(module).__name__, shape, params, params, reason=reason))
    return layers


def _some(names: Iterable[str], limit: int = 8) -> str:
    shown = list(names)
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")


def _why_dense(module: nn.Module) -> str | None:
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} is not supported"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"grouped convolution ({module.groups} groups)"
    return None


def _shared_weights(model: nn.Module) -> set[str]:
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _select(layer: LayerPlan, method: Decomposition) -> LayerPlan:
    """Names the method for a candidate, unless even rank 1 would not make it smaller."""
    if layer.reason is not None:
        return layer
    form = method.for_shape(layer.shape)
    minimum = form.min_params(layer.shape) + _bias(layer)
    if minimum >= layer.dense_params:
        return replace(layer, reason=f"rank 1 needs {minimum} parameters, no fewer than dense")
    return replace(layer, method=form)


def _bias(layer: LayerPlan) -> int:
    return layer.dense_params - math.prod(layer.shape)


def _minimum(layer: LayerPlan) -> int:
    assert layer.method is not None
    return layer.method.min_params(layer.shape) + _bias(layer)


def _budget(layers: list[LayerPlan], rate: float, rate_scope: str, network_params: int) -> int:
    """Parameters that all tensorized layers together may have."""
    dense = sum(layer.dense_params for layer in layers)
    minimum = sum(_minimum(layer) for layer in layers)
    base, untouched = (network_params, network_params - dense) if rate_scope == "network" else (dense, 0)
    budget = math.floor(rate * base) - untouched
    if budget < minimum:
        # Rounded up, so that the rate that the message names is itself feasible.
        smallest = math.ceil((minimum + untouched) / base * 1e4) / 1e4
        raise InfeasibleRateError(
            f"rate={rate} cannot be met: rank 1 in every layer already needs {minimum + untouched:,} of "
            f"{base:,} parameters; the smallest feasible rate for this method and network is {smallest}",
            smallest,
        )
    return budget


def _weights(model: nn.Module, layers: list[LayerPlan], rate_decay: str) -> list[float]:
    """Relative rate of each layer: 1 for all, or the number of its block counted from either end."""
    if rate_decay == "flat":
        return [1.0] * len(layers)
    blocks = find_blocks(model, [layer.name for layer in layers])
    depths = [block_of(layer.name, blocks) or 0 for layer in layers]
    return [float(d + 1 if rate_decay == "linear_inc" else len(blocks) - d) for d in depths]


def _allocate(layers: list[LayerPlan], weights: list[float], budget: int) -> list[LayerPlan]:
    """Ranks for the largest common factor on weight × size at which all layers together keep to the budget.

    Each layer's share lies between its rank-1 form and its dense size. What rounding to whole ranks leaves
    over in one layer thus goes to all.
    """

    def at(scale: float) -> list[LayerPlan]:
        return [
            _rank(layer, max(_minimum(layer), min(layer.dense_params, math.floor(scale * weight * layer.dense_params))))
            for layer, weight in zip(layers, weights, strict=True)
        ]

    best, low, high = at(0.0), 0.0, 1.0 / min(weights)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = at(middle)
        if sum(layer.params for layer in tried) <= budget:
            best, low = tried, middle
        else:
            high = middle
    return best


def _rank(layer: LayerPlan, share: int) -> LayerPlan:
    assert layer.method is not None
    rank = _rank_for(layer.method, layer.shape, share - _bias(layer))
    return replace(layer, rank=rank, params=layer.method.num_params(layer.shape, rank) + _bias(layer))


@lru_cache(maxsize=65536)
def _rank_for(method: Decomposition, shape: Shape, budget: int) -> Rank:
    return method.rank_for(shape, budget)
