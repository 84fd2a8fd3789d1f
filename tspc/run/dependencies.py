"""What the network of a phase depends on: by it is known what is done before, and what was made otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tspc.phases.context import Context
from tspc.phases.phase import NetworkPhase
from tspc.run.config import Config
from tspc.store.records import differences, fingerprint


@dataclass(frozen=True)
class Dependencies:
    """The identity of the run, what of the phase's settings counts, and the fingerprint of the phase before."""

    identity: dict[str, Any]
    settings: dict[str, Any]
    after: str

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.identity, self.settings, self.after])

    def changes(self, phase: NetworkPhase, record: dict[str, Any]) -> list[str]:
        """How a network with this record was made otherwise; empty if it was not."""
        found = differences(record["settings"], self.settings, f"phase.{phase.name}")
        if record["after"] != self.after:
            found.append(f"what {phase.name} started from")
        elif not found and record["fingerprint"] != self.fingerprint:
            found.append("the run that it belongs to")
        return found


def decisive_settings(phase: NetworkPhase, config: Config, context: Context) -> dict[str, Any]:
    """What the phase's network depends on, beside the run's identity and the phase before."""
    settings = phase.decisive(config.phases[phase.name])
    if phase.trains and context.hardware.precision is not None:
        settings["precision"] = str(context.hardware.precision).removeprefix("torch.")
    calibrates = context.data is not None and config.calibration.samples > 0
    if phase.needs_data or calibrates:
        settings["data"] = context.required_data.fingerprint
    return settings
