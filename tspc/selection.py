"""Which layers of a network can be tensorized, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from tspc.errors import ConfigError
from tspc.layers import tensorized_layers
from tspc.plans import FINAL, LayerPlan


def select(
    model: nn.Module, *, keep_first: bool = True, keep_last: bool = True, exclude: Sequence[str] = ()
) -> list[LayerPlan]:
    """Every convolution and dense layer, still dense; `reason` is set where it must or shall stay so.

    Raises ConfigError for a network that is compressed already, and for a pattern that excludes nothing.
    """
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
        reason = why_dense(module)
        if name in shared:
            reason = "its weight is shared with another layer"
        elif keep_first and name == first:
            reason = "first convolution"
        elif keep_last and name == last:
            reason = FINAL
        elif any(fnmatchcase(name, pattern) for pattern in exclude):
            reason = "excluded"
        params = sum(p.numel() for p in module.parameters(recurse=False))
        shape = tuple(module.weight.shape)
        layers.append(LayerPlan(name, type(module).__name__, shape, params, params, reason=reason))
    return layers


def _some(names: Iterable[str], limit: int = 8) -> str:
    shown = list(names)
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")


def why_dense(module: nn.Module) -> str | None:
    """Why a module cannot be tensorized, apart from its place in the network; None if it can."""
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
