"""The settings of a plan: the method, the rate or error wanted, and how layers share the parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tspc.decompositions import Auto, Decomposition, Method, TensorTrain, resolve
from tspc.errors import ConfigError
from tspc.system.bounds import COUNT, NONE_OR_MORE, POSITIVE_SHARE, out_of_range, shown, unknown

GOALS = ("rate", "target_error")
"""Settings that say how small the network becomes; a plan has one of them."""
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


TENSOR_TRAIN, USUAL = TensorTrain(), Selection()


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a plan. The fields are keys of `conf/config.yaml`.

    - `method`: one decomposition for all layers, or `Auto`, which takes the best of several for each layer; or a name.
    - `rate`: the largest parameters after ÷ before, in (0, 1].
    - `target_error`, in the place of the rate, in (0, 1]: the plan has the smallest rate at which the root mean square
      of the layers' output errors is expected to be at most this.
    - `allocation`: "global" spends the budget where it lowers the error most, and may keep layers dense; "uniform"
      gives every layer the same rate. If a layer's share is too small for the smallest rank, the layer takes this rank,
      and the other layers get less.
    - `rate_decay`: how a uniform rate changes with the depth of a layer's block, at the same total: "flat",
      "linear_inc" (it rises), "linear_dec" (it falls).
    - `rate_scope`: what the rate counts: the "layers" that can be tensorized, or the whole "network".
    - `rank_multiple`: every rank is a multiple of this number, or the largest possible rank.
    - `objective`: with "latency" or "macs" a layer stays dense if no path is faster, as long as the other layers keep
      half of their parameters; with "parameters" no layer stays dense for this reason.
    - `paths`: every tensorized layer takes its cheapest path. The costs come from a cost "model", or from the clock
      ("measure").
    - `selection`: which layers stay dense.
    """

    method: Method = TENSOR_TRAIN
    rate: float = 0.2
    target_error: float | None = None
    allocation: str = "global"
    rate_decay: str = "flat"
    rate_scope: str = "layers"
    rank_multiple: int = 1
    objective: str = "parameters"
    paths: str = "model"
    selection: Selection = USUAL

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", resolve(self.method))

    @classmethod
    def of(cls, method: str | Method | PlanSettings = "tt", rate: float | None = None, **options: Any) -> PlanSettings:
        """Settings from the arguments of `tspc.plan`.

        `options` are fields of this class and of `Selection`. If `method` is a `PlanSettings`, they replace its fields.
        Raises ConfigError, with every problem, for unknown names and wrong values.
        """
        start = method if isinstance(method, PlanSettings) else cls(resolve(method))
        options |= {} if rate is None else {"rate": rate}
        own, selecting = ({field.name for field in dataclasses.fields(kind)} for kind in (cls, Selection))
        problems = unknown(options, [*sorted(own | selecting), *BESIDE])
        chosen = {key: value for key, value in options.items() if key in selecting}
        selection = dataclasses.replace(options.get("selection", start.selection), **chosen)
        given = {key: value for key, value in options.items() if key in own}
        made = dataclasses.replace(start, **given | {"selection": selection})
        problems += made.problems("")
        if None not in (options.get("rate"), made.target_error) and made._two_goals not in problems:
            problems.append(made._two_goals)
        if problems:
            raise ConfigError(problems)
        return made

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range, and for values that do not go together."""
        is_method = isinstance(self.method, Decomposition | Auto)
        found = [] if is_method else [f"method={shown(self.method)}: expected a method's name, or a method"]
        allowed = {
            "rate": POSITIVE_SHARE,
            "target_error": POSITIVE_SHARE,
            "allocation": ALLOCATIONS,
            "rate_decay": RATE_DECAYS,
            "rate_scope": RATE_SCOPES,
            "rank_multiple": COUNT,
            "objective": OBJECTIVES,
            "paths": PATH_COSTS,
        }
        found += out_of_range(self, where, allowed)
        if self.target_error is not None and self.rate != PlanSettings.rate:
            found.append(self._two_goals)
        if self.rate_decay in RATE_DECAYS[1:] and self.allocation == "global":
            found.append(f"rate_decay={self.rate_decay} sets the rate of each layer, so it needs allocation=uniform")
        return found + self.selection.problems(where)

    @property
    def _two_goals(self) -> str:
        return f"rate={self.rate} and target_error={self.target_error} are two goals; leave one of them out"

    @property
    def needs_curves(self) -> bool:
        """Whether the ranks depend on the layers' errors."""
        return self.allocation == "global" or self.target_error is not None or isinstance(self.method, Auto)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings as plain data, without the selection, which belongs to its phase."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["selection"]
        return plain | {"method": self.method.to_dict()}
