"""The reference network of a run: read from a file, published, random, or trained once and shared."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tspc import __version__
from tspc.calibration.samples import Samples
from tspc.compression import checkpoint
from tspc.compression.error_curve import Curves, ErrorCurve
from tspc.compression.form import PLAIN
from tspc.compression.outline import Outline
from tspc.data import Data, DataSpec, OwnSpec, TextSpec
from tspc.errors import TrainingError, TspcError
from tspc.models import NetworkSpec
from tspc.models.weights import load_state, read_state
from tspc.phases.context import Context
from tspc.phases.finetune import train_classifier
from tspc.phases.planning import measure_curves
from tspc.run.config import Config
from tspc.run.folders import elsewhere
from tspc.run.published import with_tokens
from tspc.store.directory import RunDirectory
from tspc.store.files import intact, make_folder, remove, remove_left_over, write_json
from tspc.store.records import file_digest, fingerprint, plain, usual
from tspc.store.schemas import ACCURACY, CURVES, SECONDS, problem
from tspc.store.scores import TOP1
from tspc.store.state import tensor_state
from tspc.system import processes
from tspc.system.launch import is_first
from tspc.training import Progress, Recipe, judged


@dataclass
class Pretrained:
    """The reference network of a run. `identity` says where its weights come from, and tells references apart.

    `seconds` is how long its training took; None if tspc did not train it.
    """

    model: nn.Module
    identity: dict[str, Any]
    seconds: float | None = None


def network_spec(config: Config, data: Data | None) -> NetworkSpec:
    """The network to build. If the configuration gives no number of classes or of tokens, it comes from the data."""
    spec = with_tokens(config.network, config)
    if spec.num_classes is None and data is not None:
        return dataclasses.replace(spec, num_classes=data.num_classes)
    return spec


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensor_state(model).items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def untrained_reference(config: Config, spec: NetworkSpec, data: Data | None) -> Pretrained:
    """The network with the weights that `pretrained` names; if it is null, with seeded initial weights.

    Nothing is written. Raises WeightsError or ConfigError if the weights cannot be read or do not fit.
    """
    torch.manual_seed(config.seed if config.pretrained == "random" else 0)
    model = spec.build(pretrained=config.pretrained == "default")
    source = config.pretrained
    if source is None:
        assert data is not None
        return Pretrained(model, {"trained": _recipe_identity(config, spec, data)})
    if source == "random":
        return Pretrained(model, {"random": config.seed})
    if source == "default":
        return Pretrained(
            model, {"published": spec.name} if spec.family == "torchvision" else {"given": _digest(model)}
        )
    load_state(model, read_state(source), f"pretrained={source}")
    return Pretrained(model, {"file": file_digest(Path(source))})


def _recipe_identity(config: Config, spec: NetworkSpec, data: Data) -> dict[str, Any]:
    assert config.pretrain_recipe is not None
    return {
        "recipe": plain(config.pretrain_recipe),
        "dataset": data_identity(config),
        "data": data.fingerprint,
        "network": spec.to_dict(),
    }


DATA_BY_DEFAULT = usual(OwnSpec) | usual(TextSpec) | usual(DataSpec)
"""The settings of data sets that have a default."""
TRAINED_BY_DEFAULT = {"recipe": usual(Recipe), "dataset": DATA_BY_DEFAULT, "network": usual(NetworkSpec)}
"""The settings of a reference's training that have a default."""


def data_identity(config: Config) -> dict[str, Any]:
    """The settings of the data set that change a result."""
    return {key: value for key, value in plain(config.dataset).items() if key != "workers"} | config.task.identity


def train_reference(reference: Pretrained, config: Config, spec: NetworkSpec, context: Context, folder: Path) -> None:
    """Trains the reference in `folder`, or reads the one that an earlier run of the sweep left there.

    If another process trains it, this one waits. Raises RunError if the folder holds a reference with other settings
    and `overwrite` is not set.
    """
    assert config.pretrain_recipe is not None
    result = folder / "model.safetensors"
    identity = reference.identity["trained"]
    display = context.display
    waiting = lambda: display.line(f"waiting for another run to finish the reference network in {folder}")  # noqa: E731
    aside, defaults = elsewhere(config, "another output_dir"), TRAINED_BY_DEFAULT
    directory = RunDirectory(folder, identity, config.overwrite, waiting, aside, defaults=defaults)
    if config.overwrite and directory.held_by_another():
        display.line(f"reference  trained anew in {folder}; runs that used the old one can no longer go on")
    with directory as run:
        if processes.by_first(result.exists) and not (config.overwrite and list(config.phases) == ["pretrain"]):
            checkpoint.load(result, reference.model)
            info: Any = checkpoint.read_header(result).get("info")
            reference.seconds = info["seconds"] if problem(info, {"seconds": SECONDS}) is None else None
            Progress.discard(run.file("progress.pt"))  # of a process that was killed before it did
            display.line(f"reference  read from {result}")
            return
        context.place(reference.model)
        state = fingerprint([run.identity, str(context.hardware.precision)])
        progress = Progress(run.file("progress.pt"), state, config.checkpoint_seconds)
        # The reference depends neither on the run's seed nor on its goal: a sweep shares it.
        shared = dataclasses.replace(context, seed=0, note=run.note, reserved=0)
        try:
            train_classifier(reference.model, config.pretrain_recipe, shared, progress, "pretrain")
        except TrainingError as error:
            raise TrainingError(f"pretrain: {error}, as dataset.pretrain.learning_rate") from error
        reference.seconds = progress.seconds
        stale = [path for pattern in ("accuracy-*.json", "curves-*.json") for path in folder.glob(pattern)]
        for path in stale if is_first() else ():
            remove(path)
        checkpoint.save(reference.model, result, network=spec, info={"seconds": reference.seconds})
        Progress.discard(run.file("progress.pt"))


def reference_curves(
    reference: Pretrained, config: Config, sketch: Outline, samples: Samples | None, context: Context, folder: Path
) -> Curves:
    """The error curves of the layers that can be tensorized. They are measured once; later runs read them."""
    identity = {
        "reference": reference.identity,
        "method": config.planning.method.to_dict(),
        "network": network_spec(config, context.data).to_dict(),
        "layers": [[layer.name, *layer.shape] for layer in sketch.chosen],
        "version": __version__,
        "calibration": calibration_identity(config, samples is not None),
        "data": None if samples is None or context.data is None else context.data.fingerprint,
        "dataset": None if samples is None else data_identity(config),
    }
    if config.planning.widths != PLAIN:
        identity["widths"] = plain(config.planning.widths)
    path = folder / f"curves-{fingerprint(identity)}.json"
    known = processes.by_first(lambda: _known_curves(path, [layer.name for layer in sketch.chosen]))
    if known is not None:
        return known
    _prepare(path, context)
    context.place(reference.model).eval()
    curves = measure_curves(reference.model, sketch.layers, config.planning, samples, context)
    write_json(path, {name: [curve.to_dict() for curve in of_layer] for name, of_layer in curves.items()})
    return curves


def calibration_identity(config: Config, is_used: bool) -> dict[str, Any] | None:
    """The settings of the calibration that change a result; None without calibration."""
    if not is_used or config.calibration.samples == 0:
        return None
    return {key: value for key, value in plain(config.calibration).items() if key != "memory"}


def reference_accuracy(reference: Pretrained, config: Config, context: Context, folder: Path) -> dict[str, Any] | None:
    """What the metric says of it on all test images; None without data. Measured once; later runs read it."""
    if context.data is None or config.pretrained == "random":
        return None
    identity = {"reference": reference.identity, "dataset": data_identity(config), "data": context.data.fingerprint}
    if config.metric != TOP1:
        identity["metric"] = config.metric
    path = folder / f"accuracy-{fingerprint(identity)}.json"
    known = processes.by_first(lambda: intact(path, ACCURACY))
    if known is not None:
        return known
    _prepare(path, context)
    context.place(reference.model).eval()
    model = reference.model
    accuracy = judged(context.metric, model, context.data, context.device, model).to_dict()
    write_json(path, accuracy)
    return accuracy


def _prepare(path: Path, context: Context) -> None:
    """Makes the folder of a file that will hold a measurement; says so if the old file is damaged."""
    make_folder(path.parent)
    if is_first():
        remove_left_over(path.parent)
        if path.exists():
            context.display.warn(f"{path} is damaged; it is made anew")


def _known_curves(path: Path, layers: list[str]) -> Curves | None:
    """The curves of these layers that an earlier run measured; None if there are none, or they are damaged."""
    found = intact(path, CURVES)
    if found is None or sorted(found) != sorted(layers):
        return None
    with suppress(TspcError, ValueError, TypeError):
        return {name: [ErrorCurve.from_dict(curve) for curve in curves] for name, curves in found.items()}
    return None
