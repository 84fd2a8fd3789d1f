"""The settings of a plan: the method, the rate or error wanted, and how layers share the parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tspc.compression.form import DENSE, Widths
from tspc.compression.goal_names import DROP, TIMES
from tspc.compression.goals import (
    AUTO,
    USUAL_RATE,
    Terms,
    bits_of,
    contradiction,
    goals_in,
    wrong_goals,
)
from tspc.compression.plan import BYTES, PARAMETERS, UNITS
from tspc.decompositions import Auto, Decomposition, Method, TensorTrain, resolve
from tspc.deploy.calls import EXTRAS, RUNTIMES, family
from tspc.errors import ConfigError
from tspc.quantization.grids import BITS, FULL
from tspc.system import extras
from tspc.system.bounds import COUNT, NONE_OR_MORE, out_of_range, shown, unknown

AUTO_BITS = (8, 6, 5, 4)
"""The widths from which the plan chooses."""
WIDTHS = (*map(str, BITS), AUTO)
ALLOCATIONS = ("global", "uniform")
RATE_DECAYS = ("flat", "linear_inc", "linear_dec")
RATE_SCOPES = ("layers", "network")
OBJECTIVES = ("parameters", "latency", "macs")
PATH_COSTS = ("model", "measure")
"""How the costs of a layer's paths are found."""
BESIDE = ("calibration", "settings", "filter_fn", "example", "on_layer", "progress", "spread")
"""Arguments of `tspc.plan` and `tspc.compress` that are not settings."""


@dataclass(frozen=True)
class Selection:
    """Which layers stay dense.

    These are the first convolution (`keep_first`), the last layer (`keep_last`), layers whose name matches a wildcard
    in `exclude`, and layers with fewer than `min_params` parameters. If `include` has wildcards, layers whose name
    matches none of them stay dense, too.
    """

    keep_first: bool = True
    keep_last: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_params: int = 0

    def __post_init__(self) -> None:
        for key in ("include", "exclude"):
            value = getattr(self, key)
            object.__setattr__(self, key, value if isinstance(value, str) else tuple(value))

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        prefix = f"{where}." if where else ""
        lists = {key: getattr(self, key) for key in ("include", "exclude")}
        texts = [
            f"{prefix}{key}={value}: expected a list of wildcards, as in [{value!r}]"
            for key, value in lists.items()
            if isinstance(value, str)
        ]
        return texts + out_of_range(self, where, {"min_params": NONE_OR_MORE})


TENSOR_TRAIN, USUAL, USUAL_TERMS = TensorTrain(), Selection(), Terms()


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a plan. The fields are keys of `conf/config.yaml`.

    - `method`: one decomposition for all layers, or `Auto`, which takes the best of several for each layer; or a name.
    - `rate`: the largest parameters after ÷ before, in (0, 1]; 0.2 if no goal is given.
    - `target_error`, in the place of the rate, in (0, 1]: the plan has the smallest rate at which the root mean square
      of the layers' output errors is expected to be at most this.
    - `size`, in the place of the rate: the largest size of the whole network, as "500kB", "2MB" or "100000B", or as a
      share of the bytes of its numbers before, in (0, 1]. Scales, biases and norms count, too.
    - `max_drop`: the smallest network, in bytes, that loses at most this many points of the metric on held-out images.
      It is found by `tspc.compress`; a plan alone cannot know it.
    - `latency`: the longest time of a batch in the `runtime`, as "8ms" or "500us"; or `speedup`, how many times as fast
      as the dense network it is there, at least 1. The plan loses least among those that are expected to be so fast.
      A time may be combined with a rate, a size or a `max_drop`, and a size with a `max_drop`.
    - `terms`: how limits on the drop and on the time are judged.
    - `bits`: the width of the factors' entries: "32" (floating-point numbers), "16", "8", "6", "5", "4" or "3"
      (integers, with a scale for each row), or "auto", which chooses a width for each layer and needs a budget in
      bytes. None: "32" with a rate, "auto" with a size. With fewer than 32 bits layers that stay dense are rounded,
      too: to the same width, or with "auto" to 8 bits where a rule keeps them dense. The first convolution and the last
      layer then share the budget, as whole kernels. So do tables of embeddings, if the budget counts bytes; they are
      rounded like dense layers.
    - `rate_unit`: what the rate counts: "parameters", or "bytes".
    - `allocation`: "global" spends the budget where it lowers the error most, and may keep layers dense; "uniform"
      gives every layer the same rate. If a layer's share is too small for the smallest rank, the layer takes this rank,
      and the other layers get less.
    - `rate_decay`: how a uniform rate changes with the depth of a layer's block, at the same total: "flat",
      "linear_inc" (it rises), "linear_dec" (it falls).
    - `rate_scope`: what the rate counts: the "layers" that can be tensorized, or the whole "network".
    - `rank_multiple`: every rank is a multiple of this number, or the largest possible rank.
    - `objective`: with "latency" or "macs" a layer stays dense if no path is faster, as long as the other layers keep
      half of their parameters; with "parameters" no layer stays dense for this reason. With "latency" costs are times
      in the runtime, if an input is known, and the whole network is timed: it is never slower than the dense one.
    - `paths`: every tensorized layer takes its cheapest path. The costs come from a cost "model", or from the clock
      ("measure").
    - `runtime`: where the network will run, and in which precision; a name of `tspc.deploy.RUNTIMES`. The costs of
      paths are those there. "compile" counts as "eager".
    - `selection`: which layers stay dense.
    """

    method: Method = TENSOR_TRAIN
    rate: float | None = None
    target_error: float | None = None
    size: str | None = None
    max_drop: float | None = None
    latency: str | None = None
    speedup: float | None = None
    bits: str | None = None
    rate_unit: str = PARAMETERS
    allocation: str = "global"
    rate_decay: str = "flat"
    rate_scope: str = "layers"
    rank_multiple: int = 1
    objective: str = "parameters"
    paths: str = "model"
    runtime: str = "eager"
    selection: Selection = USUAL
    terms: Terms = USUAL_TERMS

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", resolve(self.method))
        for key in ("bits", "size", "latency"):  # numbers are welcome, too
            value = getattr(self, key)
            if isinstance(value, str):
                object.__setattr__(self, key, value.replace(" ", ""))  # "500 kB" and "500kB" are one size
            elif value is not None:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                object.__setattr__(self, key, f"{value:.10g}" if is_number else str(value))

    @classmethod
    def of(cls, method: str | Method | PlanSettings = "tt", rate: float | None = None, **options: Any) -> PlanSettings:
        """Settings from the arguments of `tspc.plan`.

        `options` are fields of this class, of `Selection` and of `Terms`. They replace those of a `PlanSettings`.
        Raises ConfigError, with every problem, for unknown names and wrong values.
        """
        start = method if isinstance(method, PlanSettings) else cls(resolve(method))
        options |= {} if rate is None else {"rate": rate}
        groups = {"selection": Selection, "terms": Terms}
        names = {key: {field.name for field in dataclasses.fields(kind)} for key, kind in groups.items()}
        own = {field.name for field in dataclasses.fields(cls)}
        problems = unknown(options, [*sorted(own.union(*names.values())), *BESIDE])
        given = {key: value for key, value in options.items() if key in own}
        for group, known in names.items():
            chosen = {key: value for key, value in options.items() if key in known}
            given[group] = dataclasses.replace(options.get(group, getattr(start, group)), **chosen)
        made = dataclasses.replace(start, **given)
        problems += made.problems("") + made.terms.problems("")
        idle = made.terms.idle(vars(made), made.objective == "latency")
        given_idle = [key for key in idle if key in options and options[key] != getattr(USUAL_TERMS, key)]
        problems += [f"{key}={shown(options[key])} has no effect with {idle[key]}; leave it out" for key in given_idle]
        if problems:
            raise ConfigError(problems)
        return made

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range, and for values that do not go together."""
        is_method = isinstance(self.method, Decomposition | Auto)
        found = [] if is_method else [f"method={shown(self.method)}: expected a method's name, or a method"]
        allowed = {
            "allocation": ALLOCATIONS,
            "rate_decay": RATE_DECAYS,
            "rate_scope": RATE_SCOPES,
            "rank_multiple": COUNT,
            "objective": OBJECTIVES,
            "paths": PATH_COSTS,
            "runtime": RUNTIMES,
            "bits": WIDTHS,
            "rate_unit": UNITS,
        }
        found += wrong_goals(self) + out_of_range(self, where, allowed)
        if (wrong := contradiction(goals_in(self))) is not None:
            found.append(wrong)
        if self.is_timed and self.allocation != "global":
            found.append(f"{self.time_limit} chooses the rate of each layer, so it needs allocation=global")
        if self.is_timed and is_method and self.method == DENSE:
            found.append(f"{self.time_limit} chooses ranks, and method=dense has none: choose another method")
        if self.size is not None and self.rate_scope == "layers" != PlanSettings.rate_scope:
            found.append("size counts the whole network; leave rate_scope out")
        if self.bits == AUTO and self.size is None and self.max_drop is None and self.rate_unit == PARAMETERS:
            found.append("bits=auto compares widths under a budget in bytes: give size=…, or rate_unit=bytes")
        if is_method and self.method == DENSE and self.widths.bits == (FULL,):
            found.append("method=dense is smaller only with fewer bits: give bits=8, for example, or size=…")
        lack = extras.missing(EXTRAS[family(self.runtime)]) if self._times_elsewhere else None
        if lack is not None:
            found.append(f"runtime={self.runtime} with {self.time_limit or f'paths={self.paths}'}: {lack}")
        if self.rate_decay in RATE_DECAYS[1:] and self.allocation == "global":
            found.append(f"rate_decay={self.rate_decay} sets the rate of each layer, so it needs allocation=uniform")
        return found + self.selection.problems(where)

    @property
    def _times_elsewhere(self) -> bool:
        """Whether layers are timed in a runtime that needs an extra. The cost model needs none."""
        is_timed = self.paths == "measure" or self.is_timed
        return is_timed and self.runtime in RUNTIMES and family(self.runtime) in EXTRAS

    @property
    def is_timed(self) -> bool:
        """Whether a time in the runtime is limited."""
        return self.latency is not None or self.speedup is not None

    @property
    def time_limit(self) -> str:
        """The limit on the time, as it was given: "latency=8ms" or "speedup=3"; empty text without one."""
        return next((f"{key}={shown(getattr(self, key))}" for key in TIMES if getattr(self, key) is not None), "")

    @property
    def ceiling(self) -> float:
        """The rate that bounds the size: the one given, the usual one if there is no other goal, else 1."""
        if self.rate is not None:
            return self.rate
        return USUAL_RATE if not self.is_timed and self.max_drop is None else 1.0

    @property
    def _unit(self) -> str:
        return BYTES if self._counts_network or self.method == DENSE else self.rate_unit

    @property
    def _counts_network(self) -> bool:
        """Whether the budget is that of the whole network, in bytes."""
        return self.size is not None or self.max_drop is not None

    @property
    def decomposes(self) -> bool:
        """Whether the budget says how small the layers become. Else their width alone does."""
        return self.method != DENSE or self._counts_network or self.rate_unit == BYTES

    @property
    def scope(self) -> str:
        """What the budget counts: a `size` is that of the network."""
        return "network" if self._counts_network else self.rate_scope

    @property
    def ranks_tables(self) -> bool | None:
        """Whether tables of embeddings may have a low rank; None if only those that `include` names may."""
        if self.method == DENSE:
            return False
        return True if self.scope == "network" or self._unit == BYTES else None

    @property
    def widths(self) -> Widths:
        """The widths that factors may have."""
        bits = bits_of({"bits": self.bits, "size": self.size, DROP: self.max_drop})
        chosen = AUTO_BITS if bits == AUTO else (int(bits),) if bits in WIDTHS else (FULL,)
        return Widths(chosen, self._unit)

    @property
    def needs_curves(self) -> bool:
        """Whether the ranks depend on the layers' errors."""
        several = (
            isinstance(self.method, Auto)
            or self.widths.is_choice
            or (self._unit == BYTES and self.widths.offers_dense and self.decomposes)
        )
        return self.allocation == "global" or self.max_drop is not None or self.target_error is not None or several

    @property
    def identity(self) -> dict[str, Any]:
        """The settings as plain data, without the selection, which belongs to its phase.

        A rate that has no effect is 1, so runs that differ in it only are one run.
        """
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["selection"], plain["terms"]
        for key in (DROP, *TIMES):  # an earlier version had no such keys
            if plain[key] is None:
                del plain[key]
        rate = self.ceiling if self.decomposes else 1.0
        terms = self.terms.of(plain)
        return plain | {"method": self.method.to_dict(), "rate": rate} | ({"contract": terms} if terms else {})
