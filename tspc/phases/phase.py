"""What a phase of a run is: its settings, what it depends on, how it runs, and what it leaves.

Each phase has a file here that ends in its `PHASE`, and a row in `table.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.phases.judging import Judging
from tspc.phases.planning import Planning
from tspc.store.records import plain
from tspc.training import Progress, Recipe


@dataclass(frozen=True)
class NoSettings:
    """Of a phase that has none."""

    def problems(self, where: str) -> list[str]:
        return []


@dataclass(frozen=True)
class Work:
    """What a phase is given, beside its `settings`.

    `reference` is the pretrained network and `network` its description. `model` is the network that the phase starts
    from; None where it starts from the reference. `folder` is the run's directory, and `progress` says where an
    earlier process stopped. `judging` judges a limit on the drop, if there is one.
    """

    settings: Any
    network: NetworkSpec
    reference: nn.Module
    planning: Planning
    context: Context
    folder: Path
    model: nn.Module | None = None
    progress: Progress = field(default_factory=Progress)
    judging: Judging | None = None

    @property
    def start(self) -> nn.Module:
        """The network of the phase before."""
        assert self.model is not None, "the phase before has left a network"
        return self.model


def _accept(*given: Any) -> None:
    """Finds nothing wrong."""


@dataclass(frozen=True)
class Phase:
    """A step of a run.

    `settings` is the dataclass of `conf/phase/<name>.yaml`. A phase that `needs_data` cannot do without a data set.
    Before any work `check(settings)` raises what is wrong with the machine, and `check_network(settings, reference,
    names)` what is wrong with the network, of which the layers of these names are tensorized.
    """

    name: str
    settings: type[Any] = NoSettings
    needs_data: bool = field(default=False, kw_only=True)
    check: Callable[[Any], None] = field(default=_accept, kw_only=True)
    check_network: Callable[[Any, nn.Module, Sequence[str]], None] = field(default=_accept, kw_only=True)


@dataclass(frozen=True)
class ShowingPhase(Phase):
    """Shows something of the reference before it is changed, and leaves nothing."""

    run: Callable[[Work], None] = field(kw_only=True)


@dataclass(frozen=True)
class NetworkPhase(Phase):
    """Makes a network, from that of the phase before or from the reference; it lies in `<name>.safetensors`.

    `run` returns the network, which may be the one that it was given, and the plan as plain data if it made one. With
    `hands_over` several processes share its work (`processes.sharing`), and the first one hands its network over to the
    others; what they return does not count. The settings `of_no_effect` change no result.
    """

    run: Callable[[Work], tuple[nn.Module, dict[str, Any] | None]] = field(kw_only=True)
    hands_over: bool = field(default=False, kw_only=True)
    of_no_effect: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def trains(self) -> bool:
        return issubclass(self.settings, Recipe)

    def decisive(self, settings: Any) -> dict[str, Any]:
        """What of the settings changes the result, as plain data."""
        found = {key: value for key, value in plain(settings).items() if key not in self.of_no_effect}
        return found | {"epochs": None} if found.get("steps") is not None else found


@dataclass(frozen=True)
class DeliveryPhase(Phase):
    """Makes something of the finished network: files, measurements.

    `run` returns what it found, as plain data of the given `schema`, which is kept in `<name>.json`. `files` are the
    patterns of what it leaves besides, and `made` names those that belong to what was found, relative to the run's
    directory. `lines` and `tables` show what was found: the lines where it was found before.
    """

    run: Callable[[Work], dict[str, Any]] = field(kw_only=True)
    schema: Any = field(kw_only=True)
    files: tuple[str, ...] = field(default=(), kw_only=True)
    made: Callable[[dict[str, Any]], list[str]] = field(default=lambda found: [], kw_only=True)
    lines: Callable[[Path, dict[str, Any]], list[str]] = field(default=lambda folder, found: [], kw_only=True)
    tables: Callable[[dict[str, Any]], list[Table]] = field(default=lambda found: [], kw_only=True)

    @property
    def record(self) -> str:
        return f"{self.name}.json"

    @property
    def record_schema(self) -> dict[str, Any]:
        """Of the whole record: the state of the network that it was found of, and the settings."""
        return {"state": str, "settings": dict, "found": self.schema}
