"""Writes files for use elsewhere. Each is read back, run, and compared with the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tspc.deploy import FORMATS, Exporter, check_formats
from tspc.phases.inputs import Example, example
from tspc.phases.phase import DeliveryPhase, Work
from tspc.store.files import make_folder
from tspc.store.schemas import COUNT, Number
from tspc.system.bounds import SHARE, Bounds, out_of_range, shown
from tspc.terminal.display import Display

FOLDER = "export"
"""Where the files lie in the run's directory."""

FOUND = {
    "inputs": str,
    "files": [{"file": str, "bytes": COUNT, "difference": Number(0, any_float=True), "samples": COUNT}],
}
"""The schema of what `export.json` says was found."""


@dataclass(frozen=True)
class Export:
    """Which files to write, and how much their answers may differ from the network's.

    The `tolerance` is relative to the network's largest answer. The comparison uses `samples` inputs.
    """

    formats: tuple[str, ...] = FORMATS
    tolerance: float = 1e-4
    samples: int = 8

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        bounds = {"tolerance": SHARE, "samples": Bounds(1, 1e5)}
        unknown = [name for name in self.formats if name not in FORMATS]
        wrong = unknown or not self.formats
        chosen = [f"{where}.formats={shown(self.formats)}: choose from {', '.join(FORMATS)}"] if wrong else []
        return chosen + out_of_range(self, where, bounds)

    def check(self) -> None:
        """Raises ConfigError if packages are missing."""
        check_formats(self.formats)


def export_files(
    model: nn.Module, settings: Export, example: Example, folder: Path, display: Display
) -> dict[str, Any]:
    """Writes `model.<format>` into `folder`; returns what was found, as plain data. Raises ExportError, RunError."""
    make_folder(folder)
    exporter = Exporter(model, example.tensors, settings.tolerance)
    files = []
    for name in settings.formats:
        done = exporter.write(folder / f"model.{name}", name)
        display.line(describe(folder, done.to_dict(), example.source))
        files.append(done.to_dict())
    return {"inputs": example.source, "tolerance": settings.tolerance, "files": files}


def describe(folder: Path, file: dict[str, Any], source: str) -> str:
    """A line about an exported file."""
    difference = f"differs from the network by at most {file['difference']:.2g} on {file['samples']} {source}"
    return f"export     {folder / file['file']}  {file['bytes']:,} bytes, {difference}"


def _run(work: Work) -> dict[str, Any]:
    settings: Export = work.settings
    tried = example(work.context.place(work.start), work.network, settings.samples, work.context)
    return export_files(work.start, settings, tried, work.folder / FOLDER, work.context.display)


PHASE = DeliveryPhase(
    "export",
    Export,
    run=_run,
    check=Export.check,
    schema=FOUND,
    files=(f"{FOLDER}/model.*",),
    made=lambda found: [f"{FOLDER}/{file['file']}" for file in found["files"]],
    lines=lambda folder, found: [describe(folder / FOLDER, file, found["inputs"]) for file in found["files"]],
)
