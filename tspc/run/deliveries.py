"""Runs the phases that use a run's finished network: they export files and measure."""

from __future__ import annotations

from typing import Any

from torch import nn

from tspc.phases.phase import DeliveryPhase
from tspc.phases.table import DELIVERY_PHASES
from tspc.run.job import Job
from tspc.store.files import intact, remove, write_json
from tspc.store.records import differences, plain, usual


class Deliveries:
    """`state` is the fingerprint of the finished network. What a phase found of another network does not count."""

    def __init__(self, job: Job, state: str) -> None:
        self._job, self._display, self._state = job, job.context.display, state

    def found(self) -> dict[str, Any]:
        """What each phase has found of this network; a phase that has found nothing is left out."""
        records = {name: self._record(phase) for name, phase in DELIVERY_PHASES.items()}
        return {name: record["found"] for name, record in records.items() if record is not None}

    def make(self, model: nn.Module) -> None:
        """Runs the phases that were asked for and are not done yet. Raises ExportError, RunError."""
        for phase in self._requested:
            if not self._skip(phase):
                self._keep(phase, phase.run(self._job.work(phase, model)))

    def show(self) -> None:
        """Shows the tables. Also names records that are damaged or belong to an earlier network."""
        found = self.found()
        for name, phase in DELIVERY_PHASES.items():
            path = self._job.directory.file(phase.record)
            if name not in found and path.exists():
                why = "damaged" if intact(path, phase.record_schema) is None else "of an earlier network"
                self._display.line(f"{name:<9}  {phase.record} is {why}; phase={name} makes it anew")
        for phase in self._requested:
            for table in phase.tables(found[phase.name]):
                self._display.show(table)

    @property
    def _requested(self) -> list[DeliveryPhase]:
        return [phase for name, phase in DELIVERY_PHASES.items() if name in self._job.config.phases]

    def _settings(self, phase: DeliveryPhase) -> dict[str, Any]:
        return plain(self._job.config.phases[phase.name])

    def _record(self, phase: DeliveryPhase) -> dict[str, Any] | None:
        record = intact(self._job.directory.file(phase.record), phase.record_schema)
        return record if record is not None and record["state"] == self._state else None

    def _skip(self, phase: DeliveryPhase) -> bool:
        """Whether the phase was done before with these settings, and its files still exist."""
        record = self._record(phase)
        if record is None or self._job.config.overwrite:
            return False
        if differences(record["settings"], self._settings(phase), defaults=usual(phase.settings)):
            return False
        if not all(self._job.directory.file(name).exists() for name in phase.made(record["found"])):
            return False
        self._display.line(f"{phase.name:<9}  done before")
        for line in phase.lines(self._job.directory.path, record["found"]):
            self._display.line(line)
        return True

    def _keep(self, phase: DeliveryPhase, found: dict[str, Any]) -> None:
        if self._record(phase) is None:  # the files in the folder belong to another network
            folder = self._job.directory.path
            made = {folder / name for name in phase.made(found)}
            for outdated in {path for pattern in phase.files for path in folder.glob(pattern)} - made:
                remove(outdated)
        record = {"state": self._state, "settings": self._settings(phase), "found": found}
        write_json(self._job.directory.file(phase.record), record)
