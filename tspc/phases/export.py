"""Writes files for use elsewhere. Each is read back, run, and compared with the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tspc.data import Given
from tspc.deploy import ENDINGS, FORMATS, INT8, Exported, Exporter, Inputs, check_formats
from tspc.deploy.runtimes import Answering, opened
from tspc.errors import ExportError
from tspc.phases.context import Context
from tspc.phases.inputs import Example, example, for_ranges
from tspc.phases.phase import DeliveryPhase, Work
from tspc.store.files import make_folder
from tspc.store.schemas import ACCURACY, COUNT, EXPORTED, Number
from tspc.store.scores import described, scale_in, value_in
from tspc.store.scores import shown as score_shown
from tspc.system.bounds import NONE_OR_MORE, SHARE, Bounds, out_of_range, shown
from tspc.terminal.display import Display
from tspc.training import judged

FOLDER = "export"
"""Where the files lie in the run's directory."""

_HOW = {"float_layers": [str], "weights": COUNT, "on_grids": COUNT}
FOUND = {
    "inputs": str,
    "accuracy?": (ACCURACY, None),
    "files": [EXPORTED | {"difference": Number(0, any_float=True), "samples": COUNT, "int8?": _HOW}],
}
"""The schema of what `export.json` says was found."""

Images = Callable[[], list[Given | Inputs]]


@dataclass(frozen=True)
class Export:
    """Which files to write, and how much their answers may differ from the network's.

    The `tolerance` is relative to the network's largest answer. The comparison uses `samples` inputs. `calibration`
    training images show the ranges of activations in int8. The accuracy of each file is measured on `eval_samples` test
    images, None for all. A warning names a file that loses more than `accuracy_tolerance`: a share of the images, or
    what the metric counts in if it is no share.
    """

    formats: tuple[str, ...] = FORMATS
    tolerance: float = 1e-4
    samples: int = 8
    calibration: int = 256
    eval_samples: int | None = None
    accuracy_tolerance: float = 0.01

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        bounds = {
            "tolerance": SHARE,
            "samples": Bounds(1, 1e5),
            "calibration": Bounds(1, 1e6),
            "eval_samples": Bounds(1),
            "accuracy_tolerance": NONE_OR_MORE,
        }
        unknown = [name for name in self.formats if name not in ENDINGS]
        wrong = unknown or not self.formats
        known = ", ".join((*FORMATS, INT8))
        chosen = [f"{where}.formats={shown(self.formats)}: choose from {known}"] if wrong else []
        return chosen + out_of_range(self, where, bounds)

    def check(self) -> None:
        """Raises ConfigError if packages are missing."""
        check_formats(self.formats)


def export_files(
    model: nn.Module,
    settings: Export,
    example: Example,
    images: Images,
    folder: Path,
    context: Context,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """Writes `model.<ending>` into `folder` for each format; returns what was found, as plain data.

    `images` reads batches of images for the ranges of activations in int8. Some metrics compare with the `reference`.
    Raises ExportError, RunError.
    """
    make_folder(folder)
    calibration = images() if INT8 in settings.formats else None
    exporter = Exporter(model, example.tensors, settings.tolerance, calibration)
    own = _measured(model, settings, context, context.device, reference)
    files = []
    for name in settings.formats:
        done = exporter.write(folder / f"model.{ENDINGS[name]}", name)
        files.append(done.to_dict() | {"accuracy": _accuracy(folder, done, settings, context, reference)})
        context.display.line(describe(folder, files[-1], example.source))
        _tell_loss(files[-1], own, settings, context.display)
    return {"inputs": example.source, "tolerance": settings.tolerance, "accuracy": own, "files": files}


def _accuracy(
    folder: Path, done: Exported, settings: Export, context: Context, reference: nn.Module | None
) -> dict[str, Any] | None:
    """The accuracy of a file in its runtime; None if it has no runtime or there is no data."""
    if done.runtime is None or context.data is None:
        return None
    try:
        network = Answering(opened(folder / done.file, done.format, torch.get_num_threads()))
        return _measured(network, settings, context, torch.device("cpu"), reference)
    except ExportError as error:
        raise ExportError(f"{folder / done.file}: {error}") from error


def _measured(
    network: nn.Module, settings: Export, context: Context, device: torch.device, reference: nn.Module | None
) -> dict[str, Any] | None:
    """The accuracy on the test split; None without data."""
    if context.data is None:
        return None
    limit = settings.eval_samples
    return judged(context.metric, network, context.data, device, reference, limit=limit).to_dict()


def _tell_loss(file: dict[str, Any], own: dict[str, Any] | None, settings: Export, display: Display) -> None:
    """Warns if a file loses more accuracy than the tolerance."""
    given = file["accuracy"]
    if given is None or own is None:
        return
    scale, (before, after) = scale_in(own), map(value_in, (own, given))
    if scale.lost(before, after) <= settings.accuracy_tolerance:
        return
    points, allowed = scale.drop(before, after), scale.points(settings.accuracy_tolerance)
    loses = f"loses {scale.number(points)}" + (" points of" if scale.is_share else " in")
    display.warn(
        f"export     {file['file']} {loses} {scale.label} against the network: {score_shown(own)} → "
        f"{score_shown(given)} on {given['images']:,} test images; phase.export.accuracy_tolerance="
        f"{settings.accuracy_tolerance:g} allows {allowed:g}"
    )


def describe(folder: Path, file: dict[str, Any], source: str) -> str:
    """A line about an exported file."""
    parts = [f"{file['bytes']:,} bytes"]
    parts.append(f"differs from the network by at most {file['difference']:.2g} on {file['samples']} {source}")
    if file.get("accuracy"):
        parts.append(f"{described(file['accuracy'])} in {file['runtime']}")
    if "int8" in file:
        kept = " and the ".join(file["int8"]["float_layers"])
        parts.append(f"the {kept} layer stay in float32" if kept else "all layers in int8")
    return f"export     {folder / file['file']}  {', '.join(parts)}"


def _run(work: Work) -> dict[str, Any]:
    settings: Export = work.settings
    tried = example(work.context.place(work.start), work.network, settings.samples, work.context)

    images = partial(for_ranges, settings.calibration, tried, "export", work.context)
    return export_files(work.start, settings, tried, images, work.folder / FOLDER, work.context, work.reference)


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
