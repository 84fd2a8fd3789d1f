"""What the network of a phase depends on. It shows whether a phase is done already, or was done with other settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tspc.phases.context import Context
from tspc.phases.phase import NetworkPhase
from tspc.run.config import Config
from tspc.store.records import differences, fingerprint


@dataclass(frozen=True)
class Dependencies:
    """The run's identity, the settings of the phase that matter, and the fingerprint of the network before it."""

    identity: dict[str, Any]
    settings: dict[str, Any]
    after: str

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.identity, self.settings, self.after])

    def changes(self, phase: NetworkPhase, record: dict[str, Any]) -> list[str]:
        """What was different when the network with this record was made; empty if nothing was."""
        found = differences(record["settings"], self.settings, f"phase.{phase.name}")
        if record["after"] != self.after:
            found.append(f"the network that {phase.name} started from")
        elif not found and record["fingerprint"] != self.fingerprint:
            found.append("the run that it belongs to")
        return found


def decisive_settings(phase: NetworkPhase, config: Config, context: Context) -> dict[str, Any]:
    """What the phase's network depends on, besides the run's identity and the network before it."""
    settings = phase.decisive(config.phases[phase.name])
    if phase.trains and context.hardware.precision is not None:
        settings["precision"] = str(context.hardware.precision).removeprefix("torch.")
    calibrates = context.data is not None and config.calibration.samples > 0
    if phase.needs_data or calibrates:
        settings["data"] = context.required_data.fingerprint
    return settings
