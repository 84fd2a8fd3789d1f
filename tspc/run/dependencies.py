"""What the network of a phase depends on. It shows whether a phase is done already, or was done with other settings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from tspc.phases.context import Context
from tspc.phases.phase import NetworkPhase
from tspc.phases.table import FIRST, NETWORK_PHASES
from tspc.run.config import Config
from tspc.store.records import differences, fingerprint, usual


@dataclass(frozen=True)
class Dependencies:
    """The run's identity, the settings of the phase that matter, and the fingerprint of the network before it.

    `asked` is the identity as this version writes it. It may have keys more than `identity`, with their defaults.
    """

    identity: dict[str, Any]
    asked: dict[str, Any]
    settings: dict[str, Any]
    after: str

    @property
    def fingerprint(self) -> str:
        return self._of(self.identity, self.settings)

    def _of(self, identity: dict[str, Any], settings: dict[str, Any]) -> str:
        return fingerprint([identity, settings, self.after])

    def changes(self, phase: NetworkPhase, record: dict[str, Any]) -> list[str]:
        """What was different when the network with this record was made; empty if nothing was."""
        defaults = usual(phase.settings)
        found = differences(record["settings"], self.settings, f"phase.{phase.name}", defaults)
        if record["after"] != self.after:
            found.append(f"the network that {phase.name} started from")
        forms = product((self.identity, self.asked), (record["settings"], self.settings))
        if not found and record["fingerprint"] not in [self._of(*form) for form in forms]:
            found.append("the run that it belongs to")
        return found


def decisive_settings(phase: NetworkPhase, config: Config, context: Context) -> dict[str, Any]:
    """What the phase's network depends on, besides the run's identity and the network before it."""
    settings = phase.decisive(config.phases[phase.name])
    if phase.trains and context.hardware.precision is not None:
        settings["precision"] = str(context.hardware.precision).removeprefix("torch.")
    if phase.name == FIRST and config.planning.max_drop is not None:  # the size is chosen in another way
        settings["is_trained"] = any(NETWORK_PHASES[name].trains for name in config.phases if name in NETWORK_PHASES)
    calibrates = context.data is not None and config.calibration.samples > 0
    if phase.needs_data or calibrates:
        settings["data"] = context.required_data.fingerprint
    return settings
