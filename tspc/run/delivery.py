"""What is done with a run's finished network: files for use elsewhere, and measurements of what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tspc.models import NetworkSpec
from tspc.phases.benchmark import benchmark_tables, measure
from tspc.phases.context import Context
from tspc.phases.export import describe, export_files
from tspc.phases.inputs import example
from tspc.run.config import Config
from tspc.store.directory import RunDirectory
from tspc.store.files import intact, remove, write_json
from tspc.store.records import plain
from tspc.store.schemas import DELIVERED, RESULT
from tspc.traversal.copying import copied

RECORDS = {"export": "export.json", "benchmark": "benchmark.json"}
"""Where each delivery says what it found, and of which state of the network."""


def made_with(path: Path, phases: dict[str, Any]) -> dict[str, Any]:
    """What the result in `path` tells of the command that made its network; nothing if that is another network.

    A command that only exports or measures what is there must not pass for it.
    """
    before = intact(path, RESULT) or {}
    seconds = [
        [(name, phase["seconds"]) for name, phase in found.items()] for found in (before.get("phases", {}), phases)
    ]
    same = seconds[0] == seconds[1]
    return {key: before[key] for key in ("command", "settings", "device", "versions") if same and key in before}


class Delivery:
    """`state` is the fingerprint of the stage that the network comes from: what was found of another is not of it."""

    def __init__(
        self, config: Config, spec: NetworkSpec, context: Context, directory: RunDirectory, state: str
    ) -> None:
        self.config, self.spec, self.context = config, spec, context
        self.directory, self.state = directory, state

    def found(self) -> dict[str, Any]:
        """By phase, what is known of this network."""
        records = {phase: self._record(phase) for phase in RECORDS}
        return {phase: record["found"] for phase, record in records.items() if record is not None}

    def deliver(self, reference: nn.Module, model: nn.Module) -> None:
        """Exports and measures `model`, as far as asked for and not done before. Raises ExportError, RunError."""
        if self.config.export is not None and not self._done("export"):
            tried = example(self.context.place(model), self.spec, self.config.export.samples, self.context)
            folder = self.directory.file("export")
            found = export_files(model, self.config.export, tried, folder, self.context.display)
            if self._record("export") is None:
                names = {file["file"] for file in found["files"]}
                for outdated in (path for path in folder.glob("model.*") if path.name not in names):
                    remove(outdated)  # of another state of the network
            self._keep("export", found)
        if self.config.benchmark is not None and not self._done("benchmark"):
            dense, small = (self.context.place(copied(network)) for network in (reference, model))
            tried = example(small, self.spec, max(self.config.benchmark.batch_sizes), self.context)
            self._keep("benchmark", measure(dense, small, self.config.benchmark, tried, self.context.display))

    def show(self) -> None:
        """Tables, and what belongs to an earlier state of the network."""
        found = self.found()
        for phase, name in RECORDS.items():
            path = self.directory.file(name)
            if phase not in found and path.exists():
                why = "damaged" if intact(path, DELIVERED[phase]) is None else "of an earlier state"
                self.context.display.line(f"{phase:<9}  {name} is {why}; phase={phase} makes it anew")
        if self.config.benchmark is not None:
            for table in benchmark_tables(found["benchmark"]):
                self.context.display.show(table)

    def _record(self, phase: str) -> dict[str, Any] | None:
        record = intact(self.directory.file(RECORDS[phase]), DELIVERED[phase])
        return record if record is not None and record["state"] == self.state else None

    def _done(self, phase: str) -> bool:
        record = self._record(phase)
        if record is None or self.config.overwrite or record["settings"] != plain(getattr(self.config, phase)):
            return False
        folder = self.directory.file("export")
        if phase == "export" and not all((folder / file["file"]).exists() for file in record["found"]["files"]):
            return False
        self.context.display.line(f"{phase:<9}  done before")
        if phase == "export":
            for file in record["found"]["files"]:
                self.context.display.line(describe(folder, file, record["found"]["inputs"]))
        return True

    def _keep(self, phase: str, found: dict[str, Any]) -> None:
        settings = plain(getattr(self.config, phase))
        write_json(self.directory.file(RECORDS[phase]), {"state": self.state, "settings": settings, "found": found})
