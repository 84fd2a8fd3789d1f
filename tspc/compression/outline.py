"""The layers of a network that a plan is about, and what a rate leaves them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from tspc.compression.allocation import Candidate, candidate
from tspc.compression.beside import NARROW, bytes_saved, is_narrow_whole
from tspc.compression.beside_rows import Beside, rows_beside
from tspc.compression.error_curve import Curves
from tspc.compression.form import DENSE, Widths, decompositions_of
from tspc.compression.goals import share_of
from tspc.compression.integers import state_bytes
from tspc.compression.plan import BYTES, PARAMETERS, LayerPlan
from tspc.compression.selection import (
    DEPTHWISE,
    FilterFn,
    is_untouched,
    matches,
    parameters_beside,
    select,
    why_dense,
)
from tspc.compression.settings import PlanSettings
from tspc.errors import ConfigError, InfeasibleRateError
from tspc.layers.dense import kind_of
from tspc.layers.ties import partners_of
from tspc.layers.unpacking import of_parts
from tspc.quantization.grids import FULL, LONG_ROW

NAMED, MUCH = 3, 0.05
"""An error names at most so many parts that stay dense, each with at least this share of the parameters."""


@dataclass(frozen=True)
class Outline:
    """What is known of a plan before any rank is chosen: the layers, and what a rate leaves them.

    `network_bytes` are those of all parameters and buffers that a file holds. `beside_saved` are the bytes by which
    what lies beside the layers becomes smaller, if factors lie on grids; the parameters named in `kept` do not.
    `beside` has a row for each of the other modules with parameters.
    """

    settings: PlanSettings
    layers: tuple[LayerPlan, ...]
    network_params: int
    network_bytes: int
    beside_saved: int = 0
    kept: tuple[str, ...] = ()
    beside: tuple[Beside, ...] = ()

    @property
    def chosen(self) -> list[LayerPlan]:
        """The layers that share the budget."""
        return [layer for layer in self.layers if layer.reason is None]

    def candidates(self, curves: Curves | None) -> list[Candidate]:
        """What each of these layers may become, with its curves where they are known."""
        asked = self.settings
        found = [candidate(x, asked.method, curves, asked.rank_multiple, asked.widths) for x in self.chosen]
        return [one for one in found if one is not None]  # all of them: `outline` keeps the others dense

    @property
    def _base(self) -> int:
        """What the rate counts, before, in parameters or bytes."""
        if self.settings.scope == "layers":
            return self._dense
        return self.network_params if self.unit == PARAMETERS else self.network_bytes

    @property
    def unit(self) -> str:
        return self.settings.widths.unit

    @property
    def rate(self) -> float:
        """The rate that was asked for; a `size` as a share of what the network has before."""
        if not self.settings.decomposes:
            return 1.0
        return self.settings.ceiling if self.settings.size is None else share_of(self.settings.size, self.network_bytes)

    @property
    def _dense(self) -> int:
        return sum(layer.dense_size(self.unit) for layer in self.chosen)

    @property
    def _rest(self) -> int:
        """What the rate counts beside the layers that share the budget, after."""
        if self.settings.scope == "layers":
            return 0
        fixed = [layer for layer in self.layers if layer.reason is not None]
        saved = sum(layer.dense_size(self.unit) - layer.size(self.unit) for layer in fixed)
        return self._base - self._dense - saved - (self.beside_saved if self.unit == BYTES else 0)

    @property
    def _least(self) -> int:
        """What the rate counts with the smallest form of every layer."""
        return self._rest + sum(candidate.minimum for candidate in self.candidates(None))

    @property
    def smallest_rate(self) -> float:
        """The smallest feasible rate; rounded up, so that it is itself feasible."""
        return -(-self._least * 10_000 // self._base) / 10_000

    @property
    def without_grids(self) -> Outline:
        """The same if no layer gets fewer bits: then nothing beside them does."""
        wide = tuple(layer if layer.is_on_grids else replace(layer, bits=FULL) for layer in self.layers)
        return replace(self, layers=wide, beside_saved=0)

    def has_room_for(self, rows: Iterable[LayerPlan], rate: float) -> bool:
        """Whether the layers that share the budget fit into it as these rows."""
        return sum(row.size(self.unit) for row in rows) <= _whole_share(rate, self._base) - self._rest

    def _held_up(self) -> str:
        """The largest parts that stay dense and are counted, for the message of an error; empty if there are none."""
        if self.settings.scope == "layers":
            return ""
        fixed = [row for row in self.layers if row.reason is not None and not row.is_on_grids]
        sizes = [(row.params, row.name, row.reason) for row in (*fixed, *self.beside)]
        largest = sorted(sizes, key=lambda row: -row[0])[:NAMED]
        return "".join(
            f"; {name} holds {params / self.network_params:.0%} of the parameters and stays dense: {reason}"
            for params, name, reason in largest
            if params >= MUCH * self.network_params
        )

    def budget(self, rate: float) -> int:
        """What these layers together may have. Raises InfeasibleRateError if they cannot have so little."""
        counted = _whole_share(rate, self._base)
        if counted < self._least:
            if self.settings.size is not None:
                raise InfeasibleRateError(
                    f"size={self.settings.size} cannot be met: the smallest form of every layer already needs "
                    f"{self._least:,} of {self._base:,} bytes; the smallest feasible size for this method and network "
                    f"is {self._least}B{self._held_up()}",
                    self.smallest_rate,
                )
            what = "rank" if self.unit == PARAMETERS else "form"
            raise InfeasibleRateError(
                f"rate={rate} cannot be met: the smallest {what} in every layer already needs {self._least:,} of "
                f"{self._base:,} {self.unit}; the smallest feasible rate for this method and network is "
                f"{self.smallest_rate}{self._held_up()}",
                self.smallest_rate,
            )
        return counted - self._rest


@of_parts
def outline(model: nn.Module, settings: PlanSettings, filter_fn: FilterFn | None = None) -> Outline:
    """Finds the layers that can be tensorized. Raises ConfigError if there is none, and what `select` raises."""
    selected = select(model, settings.selection, filter_fn, settings.widths, settings.ranks_tables)
    layers = tuple(_smaller(layer, settings) for layer in selected)
    if all(layer.reason is not None for layer in layers):
        why = (
            "; ".join(f"{layer.name or 'the network itself'}: {layer.reason}" for layer in layers)
            or "it has no Conv2d or Linear"
        )
        raise ConfigError([f"the network has no layer to tensorize ({why})"])
    modules = dict(model.named_modules())
    kept = _kept(model, layers, settings)
    layers = tuple(_rounded(layer, modules[layer.name], settings.widths, kept) for layer in layers)
    saved = 0
    if settings.widths.offers_dense:
        rows = [modules[layer.name] for layer in layers if kind_of(modules[layer.name]) or layer.bits < FULL]
        saved = bytes_saved(model, rows, kept)
    params = sum(p.numel() for p in model.parameters())
    beside = rows_beside(model, {layer.name for layer in layers})
    return Outline(settings, layers, params, state_bytes(model), saved, tuple(sorted(kept)), beside)


def _kept(model: nn.Module, layers: Sequence[LayerPlan], settings: PlanSettings) -> set[str]:
    """The names of parameters that keep their numbers: those of shared layers, and those that the user left out.

    A layer that shares the weight of a table changes with it, but for its bias.
    """
    if not settings.widths.offers_dense:
        return set()
    alone = {layer.name for layer in layers if is_untouched(layer.reason)}
    found = {f"{name}.{own}" for name in alone for own, _ in model.get_submodule(name).named_parameters()}
    ties = partners_of(model)
    found -= {f"{x}.weight" for layer in layers if layer.name not in alone for x in ties.get(layer.name, ())}
    beside = parameters_beside(model).items()
    return found | {name for name, names in beside if matches(names, settings.selection.exclude)}


def _rounded(layer: LayerPlan, module: nn.Module, widths: Widths, kept: Collection[str]) -> LayerPlan:
    """A layer that a rule keeps dense, in fewer bits; unchanged if the user left it out or its kernel is shared.

    A layer of a kind that is not known has float16 numbers.
    """
    if layer.reason is None or is_untouched(layer.reason) or widths.of_rules == FULL:
        return layer
    if why_dense(module) not in (None, DEPTHWISE):
        is_free = not any(f"{layer.name}.{name}" in kept for name, _ in module.named_parameters(recurse=False))
        return replace(layer, bits=NARROW) if is_free and is_narrow_whole(module) else layer
    if layer.reason == DEPTHWISE and math.prod(layer.shape[1:]) < LONG_ROW:  # its channels would share one scale
        return layer
    return replace(layer, method=DENSE, rank=(), bits=widths.of_rules)


def _whole_share(rate: float, base: int) -> int:
    """The largest number that, divided by `base`, is at most the rate; 29 for 0.29 of 100, though 0.29 · 100 < 29."""
    near = math.floor(rate * base)
    return next(number for number in (near + 1, near, near - 1) if number / base <= rate)


def _smaller(layer: LayerPlan, settings: PlanSettings) -> LayerPlan:
    """The layer, with a reason to stay dense if even its smallest form would not make it smaller."""
    method, multiple = settings.method, settings.rank_multiple
    if layer.reason is not None or candidate(layer, method, None, multiple, settings.widths) is not None:
        return layer
    if layer.is_whole:
        return replace(layer, reason="no width makes it smaller")
    forms = decompositions_of(method, layer)
    minimum = min(form.min_params(layer.shape, multiple) for form in forms) + layer.bias_params
    rank = "rank 1" if multiple == 1 else f"rank {multiple}"
    return replace(layer, reason=f"{rank} needs {minimum} parameters, no fewer than dense")
