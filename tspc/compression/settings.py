"""What a plan is made for: the method, the goal, and how the budget is shared out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tspc.decompositions import Auto, Decomposition, Method, TensorTrain, resolve
from tspc.errors import ConfigError
from tspc.system.bounds import COUNT, NONE_OR_MORE, POSITIVE_SHARE, out_of_range, shown, unknown

GOALS = ("rate", "target_error")
"""The settings of which one says how small the network becomes."""
ALLOCATIONS = ("global", "uniform")
RATE_DECAYS = ("flat", "linear_inc", "linear_dec")
RATE_SCOPES = ("layers", "network")
OBJECTIVES = ("parameters", "latency", "macs")
PATH_COSTS = ("model", "measure")
"""Where the costs of a layer's paths come from."""
BESIDE = ("calibration", "settings", "filter_fn", "example", "on_layer")
"""What `tspc.plan` and `tspc.compress` take besides these settings."""


@dataclass(frozen=True)
class Selection:
    """Which layers stay dense.

    These are the first convolution (`keep_first`), the last layer (`keep_last`), and layers whose name matches a
    wildcard in `exclude`. Where there are wildcards in `include`, layers whose name matches none of them stay dense,
    too. So do layers with fewer than `min_params` parameters.
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
    """What a plan is made for. The fields are the keys of `conf/config.yaml`.

    - `method`: one decomposition for all layers, or `Auto`, the best of several for each. A name will do.
    - `rate`: a ceiling on parameters after ÷ before, in (0, 1].
    - `target_error`: the inverse question, in the place of the rate. The plan has the smallest rate at which the root
      mean square of the layers' output errors is expected to be at most this, in (0, 1].
    - `allocation`: "global" spends the budget where it lowers the error most, and may keep layers dense; "uniform"
      gives every layer the same rate. A layer whose share is below its smallest form takes that form, and the other
      layers get less.
    - `rate_decay`: how a uniform rate changes with the depth of a layer's block, at the same total: "flat",
      "linear_inc" (it rises), "linear_dec" (it falls).
    - `rate_scope`: what the rate counts: the "layers" that can be tensorized, or the whole "network".
    - `rank_multiple`: ranks are multiples of it, or a mode's whole size.
    - `objective`: with "latency" or "macs" layers of which no path is faster stay dense, for as long as that leaves
      the others half of their share; with "parameters" none does for that reason.
    - `paths`: where the costs of the paths come from, of which every tensorized layer takes the cheapest: a cost
      "model", or the clock ("measure").
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

        `options` are fields of this class and of `Selection`. They replace those of settings that take the method's
        place. Raises ConfigError, with every problem, for unknown names and wrong values.
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
            found.append(f"rate_decay={self.rate_decay} prescribes each layer's share: it needs allocation=uniform")
        return found + self.selection.problems(where)

    @property
    def _two_goals(self) -> str:
        return f"rate={self.rate} and target_error={self.target_error} are two goals; leave one of them out"

    @property
    def needs_curves(self) -> bool:
        """Whether the ranks follow from more than the rate."""
        return self.allocation == "global" or self.target_error is not None or isinstance(self.method, Auto)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings as plain data, without the selection, which belongs to its phase."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["selection"]
        return plain | {"method": self.method.to_dict()}
