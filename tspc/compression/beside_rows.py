"""The parameters that no layer of a plan holds, such as norms, tables and tokens, and why they stay as they are.

The rows of a plan's layers and these rows together count each parameter of a network once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tspc.decompositions import Shape

NORM, LOOKED_UP = "normalisation", "a table, which has no ranks"
"""Why a norm, and a table of embeddings, stay as they are."""
OWN = "a parameter of its own, not a layer's weight"
PARAMETER = "Parameter"
"""The kind of a row about a single parameter."""
APART = 3
"""So many rows of a kind are shown one by one; more are one line."""
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Beside:
    """A module with parameters that stay as they are, or a single parameter that is no layer's weight.

    `params` counts its parameters, without those that another row counts, and `bytes` are theirs. `shape` is that of
    the largest one.
    """

    name: str
    kind: str
    shape: Shape
    params: int
    reason: str
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Beside:
        found: dict[str, Any] = data | {"shape": tuple(data["shape"])}
        return cls(**found)


@dataclass(frozen=True)
class Line:
    """One or several rows in a table for people; `name` tells how many there are, and `kind` is empty for several."""

    name: str
    kind: str
    shape: Shape
    params: int
    reason: str
    bytes: int

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        what = " ".join(part for part in (self.name, self.kind, shape) if part)
        return f"{what}: dense: {self.reason}, {self.params:,} parameters"


def own_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """For each module its parameters, without those that it shares with a module before it."""
    seen: set[int] = set()
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        found[name] = {}
        for key, x in module.named_parameters(recurse=False):
            if id(x) not in seen:
                found[name][key] = x
        seen |= {id(x) for x in found[name].values()}
    return found


def rows_beside(model: nn.Module, layers: Collection[str]) -> tuple[Beside, ...]:
    """A row for each module with parameters that is none of the named `layers`, in the order of the network.

    A parameter that a module without a known purpose holds has a row of its own. One that several modules share counts
    in the first of them.
    """
    found: list[Beside] = []
    for name, own in own_parameters(model).items():
        if name in layers:
            continue
        module = model.get_submodule(name)
        reason = _reason(name, module)
        if own and reason is not None:
            largest = max(own.values(), key=lambda x: x.numel())
            kind, shape, params = type(module).__name__, tuple(largest.shape), sum(x.numel() for x in own.values())
            found.append(Beside(name, kind, shape, params, reason, sum(map(_bytes, own.values()))))
        elif own:
            names = ((f"{name}.{key}".removeprefix("."), x) for key, x in own.items())
            found += [Beside(each, PARAMETER, tuple(x.shape), x.numel(), OWN, _bytes(x)) for each, x in names]
    return tuple(found)


def _bytes(x: nn.Parameter) -> int:
    return x.numel() * x.element_size()


def _reason(name: str, module: nn.Module) -> str | None:
    """Why a module's parameters stay as they are; None if each one is a parameter of its own."""
    kind, own = type(module).__name__, [x for x in module._parameters.values() if x is not None]
    if isinstance(module, _NORMS) or ("norm" in kind.lower() and all(x.ndim < 2 for x in own)):
        return NORM
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return LOOKED_UP
    if isinstance(module, nn.Bilinear):
        return "it multiplies two inputs, so its weight is no matrix"
    if isinstance(module, nn.PReLU):
        return "the slopes of an activation"
    if isinstance(module, parametrize.ParametrizationList):
        layer, _, weight = name.rpartition(".parametrizations.")
        return f"{layer}.{weight} is computed from it"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        return f"{kind} is not supported"
    is_holder = isinstance(module, nn.ParameterList | nn.ParameterDict)
    return f"{kind} is not supported" if type(module).__module__.startswith("torch.nn.") and not is_holder else None


def lines(rows: Sequence[Beside]) -> list[Line]:
    """The rows for people: those of one kind are one line if they are many."""
    groups: dict[tuple[str, str], list[Beside]] = {}
    for row in rows:
        groups.setdefault(("", NORM) if row.reason == NORM else (row.kind, row.reason), []).append(row)
    found: list[Line] = []
    for (kind, reason), group in groups.items():
        if len(group) == 1 or (len(group) <= APART and reason != NORM):
            found += [Line(row.name, row.kind, row.shape, row.params, reason, row.bytes) for row in group]
        else:
            what = "normalisation layers" if reason == NORM else "parameters" if reason == OWN else f"times {kind}"
            params, size = sum(row.params for row in group), sum(row.bytes for row in group)
            found.append(Line(f"{len(group)} {what}", "", (), params, reason, size))
    return found
