"""What is done with a run's finished network: files for use elsewhere, and measurements of what it costs."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tspc.config import Config
from tspc.files import read_json, write_json
from tspc.models import NetworkSpec
from tspc.phases.benchmark import benchmark_tables, measure
from tspc.phases.context import Context
from tspc.phases.export import describe, export_files
from tspc.phases.inputs import example
from tspc.runs import RunDirectory, plain
from tspc.training import place

RECORDS = {"export": "export.json", "benchmark": "benchmark.json"}
"""Where each delivery says what it found, and of which state of the network."""


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
        device = self.context.device
        if self.config.export is not None and not self._done("export"):
            tried = example(place(model, device), self.spec, self.config.export.samples, self.context)
            folder = self.directory.file("export")
            self._keep("export", export_files(model, self.config.export, tried, folder, self.context.display))
        if self.config.benchmark is not None and not self._done("benchmark"):
            dense, small = (place(copy.deepcopy(network), device) for network in (reference, model))
            tried = example(small, self.spec, max(self.config.benchmark.batch_sizes), self.context)
            self._keep("benchmark", measure(dense, small, self.config.benchmark, tried, self.context.display))

    def show(self) -> None:
        """Tables, and what belongs to an earlier state of the network."""
        found = self.found()
        for phase, name in RECORDS.items():
            if phase not in found and self.directory.file(name).exists():
                self.context.display.line(f"{phase:<9}  {name} is of an earlier state; phase={phase} makes it anew")
        if self.config.benchmark is not None:
            for table in benchmark_tables(found["benchmark"]):
                self.context.display.show(table)

    def _record(self, phase: str) -> dict[str, Any] | None:
        path = self.directory.file(RECORDS[phase])
        record = read_json(path) if path.exists() else None
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
