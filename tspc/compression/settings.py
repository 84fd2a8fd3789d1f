"""The settings of a plan: the method, the rate or error wanted, and how layers share the parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tspc.compression.form import DENSE, Widths
from tspc.compression.plan import BYTES, PARAMETERS, UNITS
from tspc.decompositions import Auto, Decomposition, Method, TensorTrain, resolve
from tspc.deploy.calls import EXTRAS, RUNTIMES, family
from tspc.errors import ConfigError
from tspc.quantization.grids import BITS, FULL
from tspc.system import extras
from tspc.system.bounds import COUNT, NONE_OR_MORE, POSITIVE_SHARE, out_of_range, shown, unknown

GOALS = ("rate", "target_error", "size")
"""Settings that say how small the network becomes; a plan has one of them."""
AUTO = "auto"
AUTO_BITS = (8, 6, 5, 4)
"""The widths from which the plan chooses."""
WIDTHS = (*map(str, BITS), AUTO)
UNIT_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MANY_BYTES = 10**13
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


def bytes_or_share(size: str) -> float | None:
    """Bytes (above 1) or a share (at most 1) from text; None if it is neither."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?) ?(|B|kB|KB|MB|GB|KiB|MiB|GiB)", size.strip())
    if found is None:
        return None
    number, unit = float(found.group(1)), found.group(2)
    if not unit:
        return number if 0 < number <= 1 else None
    count = number * UNIT_BYTES[unit]
    return count if 1 < count <= MANY_BYTES else None


def share_of(size: str, whole: int) -> float:
    """A size as a share of so many bytes, at most 1."""
    value = bytes_or_share(size)
    assert value is not None, "a size that was checked"
    return value if value <= 1 else min(value / whole, 1.0)


def goal_of(settings: Mapping[str, Any]) -> str:
    """What a plan was asked for, as in a folder's name; `settings` are those of `PlanSettings.identity`.

    It is a rate, a size ("size0.1"), an error ("error0.3"), or the width of a network that is not decomposed ("8bits").
    """
    if settings.get("size") is not None:
        return f"size{settings['size']}"
    if settings.get("target_error") is not None:
        return f"error{settings['target_error']:g}"
    is_rounded_only = settings["method"]["name"] == DENSE.name and settings.get("rate_unit", PARAMETERS) == PARAMETERS
    return f"{settings.get('bits')}bits" if is_rounded_only else f"{settings['rate']:g}"


def bits_of(settings: Mapping[str, Any]) -> str:
    """The width that was asked for: "32", "8", …, or "auto"; `settings` are those of any version."""
    given = settings.get("bits")
    return given or (str(FULL) if settings.get("size") is None else AUTO)


TENSOR_TRAIN, USUAL = TensorTrain(), Selection()


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a plan. The fields are keys of `conf/config.yaml`.

    - `method`: one decomposition for all layers, or `Auto`, which takes the best of several for each layer; or a name.
    - `rate`: the largest parameters after ÷ before, in (0, 1].
    - `target_error`, in the place of the rate, in (0, 1]: the plan has the smallest rate at which the root mean square
      of the layers' output errors is expected to be at most this.
    - `size`, in the place of the rate: the largest size of the whole network, as "500kB", "2MB" or "100000B", or as a
      share of its float32 numbers, in (0, 1]. Scales, biases and norms count, too.
    - `bits`: the width of the factors' entries: "32" (floating-point numbers), "16", "8", "6", "5", "4" or "3"
      (integers, with a scale for each row), or "auto", which chooses a width for each layer and needs a budget in
      bytes. None: "32" with a rate, "auto" with a size. With fewer than 32 bits layers that stay dense are rounded,
      too: to the same width, or with "auto" to 8 bits where a rule keeps them dense. The first convolution and the last
      layer then share the budget, as whole kernels. So do tables of embeddings, if the budget counts bytes; they are
      rounded like dense layers.
    - `rate_unit`: what the rate counts: "parameters", or "bytes", compared with float32.
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
    - `runtime`: where the network will run, and in which precision; a name of `tspc.deploy.RUNTIMES`. The costs of
      paths are those there. "compile" counts as "eager".
    - `selection`: which layers stay dense.
    """

    method: Method = TENSOR_TRAIN
    rate: float = 0.2
    target_error: float | None = None
    size: str | None = None
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", resolve(self.method))
        for key in ("bits", "size"):  # numbers are welcome, too
            value = getattr(self, key)
            if isinstance(value, str):
                object.__setattr__(self, key, value.replace(" ", ""))  # "500 kB" and "500kB" are one size
            elif value is not None:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                object.__setattr__(self, key, f"{value:.10g}" if is_number else str(value))

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
        asked = [key for key in GOALS if key != "rate" and getattr(made, key) is not None]
        if options.get("rate") is not None and asked and made._two_goals not in problems:
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
            "runtime": RUNTIMES,
            "bits": WIDTHS,
            "rate_unit": UNITS,
        }
        found += out_of_range(self, where, allowed)
        if self.size is not None and bytes_or_share(self.size) is None:
            found.append(
                f"size={shown(self.size)}: expected a number with a unit, as in 500kB, 2MB or 100000B, or a share of "
                "the float32 network above 0 and at most 1"
            )
        if len(self._goals) > 1:
            found.append(self._two_goals)
        if self.size is not None and self.rate_scope == "layers" != PlanSettings.rate_scope:
            found.append("size counts the whole network; leave rate_scope out")
        if self.bits == AUTO and self.size is None and self.rate_unit == PARAMETERS:
            found.append("bits=auto compares widths under a budget in bytes: give size=…, or rate_unit=bytes")
        if is_method and self.method == DENSE and self.widths.bits == (FULL,):
            found.append("method=dense is smaller only with fewer bits: give bits=8, for example, or size=…")
        lack = extras.missing(EXTRAS[family(self.runtime)]) if self._times_elsewhere else None
        if lack is not None:
            found.append(f"runtime={self.runtime} with paths={self.paths}: {lack}")
        if self.rate_decay in RATE_DECAYS[1:] and self.allocation == "global":
            found.append(f"rate_decay={self.rate_decay} sets the rate of each layer, so it needs allocation=uniform")
        return found + self.selection.problems(where)

    @property
    def _times_elsewhere(self) -> bool:
        """Whether layers are timed in a runtime that needs an extra. The cost model needs none."""
        return self.paths == "measure" and self.runtime in RUNTIMES and family(self.runtime) in EXTRAS

    @property
    def _goals(self) -> list[str]:
        """The goals that are given."""
        usual = {"rate": PlanSettings.rate}
        return [key for key in GOALS if getattr(self, key) != usual.get(key)]

    @property
    def _two_goals(self) -> str:
        named = dict.fromkeys(("rate", *self._goals)) if len(self._goals) < 2 else self._goals
        return f"{' and '.join(f'{key}={getattr(self, key)}' for key in named)} are two goals; leave one of them out"

    @property
    def _unit(self) -> str:
        return BYTES if self.size is not None or self.method == DENSE else self.rate_unit

    @property
    def decomposes(self) -> bool:
        """Whether the budget says how small the layers become. Else their width alone does."""
        return self.method != DENSE or self.size is not None or self.rate_unit == BYTES

    @property
    def scope(self) -> str:
        """What the budget counts: a `size` is that of the network."""
        return "network" if self.size is not None else self.rate_scope

    @property
    def widths(self) -> Widths:
        """The widths that factors may have."""
        bits = bits_of({"bits": self.bits, "size": self.size})
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
        return self.allocation == "global" or self.target_error is not None or several

    @property
    def identity(self) -> dict[str, Any]:
        """The settings as plain data, without the selection, which belongs to its phase.

        A rate that has no effect is 1, so runs that differ in it only are one run.
        """
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["selection"]
        rate = self.rate if self.decomposes else 1.0
        return plain | {"method": self.method.to_dict(), "rate": rate}
