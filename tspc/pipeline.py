"""Which phases run, in which order, from which state: a run from its configuration to `result.json`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tspc.blocks import find_blocks
from tspc.config import Config
from tspc.data import Data, load_data
from tspc.decompositions import METHODS
from tspc.display import Display
from tspc.errors import ConfigError, DataError, RunError
from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.planning import plan
from tspc.plans import Plan
from tspc.reference import (
    Reference,
    data_identity,
    network_spec,
    reference_accuracy,
    train_reference,
    untrained_reference,
)
from tspc.report import percent
from tspc.runs import RunDirectory
from tspc.stages import Stages


def run(config: Config, display: Display) -> dict[str, Any]:
    """Does what the configuration asks for; returns what `result.json` holds.

    Everything that can be wrong is checked before anything is written. Raises TspcError.
    """
    device = pick_device(config.device)
    data = _data(config, display)
    spec = network_spec(config, data)
    reference = untrained_reference(config, spec, data)
    if data is not None:
        _check_images(reference.model, data, spec)
    ranks = _plan(config, reference.model) if config.decompose is not None else None
    if ranks is not None:
        display.line(_summary(ranks))
    context = Context(data, device, config.seed, display)
    if config.phases == ("pretrain",):
        summary = _prepare(reference, config, spec, context)
        return {"directory": str(_shared(config, spec)), "reference": summary, "phases": {}}
    directory = RunDirectory(run_path(config, spec), _identity(config, spec, reference), config.overwrite)
    if ranks is None:
        _require_decomposed(directory, config)
    with directory:
        summary = _prepare(reference, config, spec, context)
        noted = dataclasses.replace(context, note=directory.note)
        return Stages(config, spec, reference.model, noted, directory).execute(ranks, summary)


def _require_decomposed(directory: RunDirectory, config: Config) -> None:
    """A run that starts with a later phase needs what `decompose` left; overwriting does not make it."""
    if directory.held_by_another() or not os.path.exists(directory.file("decompose.safetensors")):
        later = ",".join(phase for phase in config.phases if phase != "pretrain")
        raise RunError(
            f"phase={','.join(config.phases)} needs a decomposed network of these settings, and {directory.path} has "
            f"none: run phase=[decompose,{later}]"
        )


def _check_images(model: nn.Module, data: Data, spec: NetworkSpec) -> None:
    """Runs two test images through the network. Raises ConfigError if it cannot take them, or answers otherwise."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images, _ = next(iter(data.test_batches(2, device, limit=2)))
    model.eval()
    try:
        with torch.no_grad():
            shape = tuple(model(images).shape)
    except Exception as error:  # the network may be the user's own
        raise ConfigError(
            [f"{spec.name} cannot take the data set's images of shape {tuple(images.shape[1:])}: {error}"]
        ) from error
    if shape != (len(images), data.num_classes):
        raise ConfigError(
            [f"{spec.name} answers with {shape[1:]} values an image; the data has {data.num_classes} classes"]
        )


def _shared(config: Config, spec: NetworkSpec) -> Path:
    """Where the runs of a sweep share their reference network."""
    return config.output_dir / config.dataset.name / spec.name / "reference"


def _prepare(reference: Reference, config: Config, spec: NetworkSpec, context: Context) -> dict[str, Any]:
    """Trains the reference where none was given, and measures it; returns what the result says of it."""
    folder = _shared(config, spec)
    if config.pretrained is None:
        train_reference(reference, config, spec, context, folder)
    accuracy = reference_accuracy(reference, config, context, folder)
    source = "random initial weights" if config.pretrained == "random" else config.pretrained or "trained here"
    context.display.line(f"reference  {spec.name}, {source}: top-1 {percent(accuracy)}")
    return {"accuracy": accuracy, "seconds": reference.seconds, "source": source}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError if it is absent."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"device={name} cannot be used here ({reason}); use device=auto or cpu"]) from error
    return device


def run_path(config: Config, spec: NetworkSpec) -> Path:
    """`<output_dir>/<dataset>/<network>/<method>-<rate>/seed<seed>`; method settings, decay and scope that depart
    from the defaults are appended to the rate, and so is `variant`."""
    settings = config.method.to_dict()
    defaults = METHODS[settings["name"]]().to_dict()
    parts = [f"{settings['name']}-{config.rate:g}"]
    parts += [f"{key}{value}" for key, value in settings.items() if value != defaults[key]]
    parts += [config.rate_decay] if config.rate_decay != "flat" else []
    parts += ["network"] if config.rate_scope == "network" else []
    parts += [config.variant] if config.variant else []
    return config.output_dir / config.dataset.name / spec.name / "-".join(parts) / f"seed{config.seed}"


def _data(config: Config, display: Display) -> Data | None:
    """The data set; None where only the weights matter and there is none."""
    if not config.trains and (config.pretrained == "random" or config.dataset.kind == "none"):
        return None
    if config.dataset.kind == "none":
        raise DataError(f"phase={','.join(config.phases)} needs data: name a data set, for example dataset=imagefolder")
    try:
        return load_data(config.dataset, config.data_dir, download=config.trains)
    except DataError as error:
        if config.trains or config.data_dir is not None:
            raise
        display.line(f"accuracy will not be measured: {error}")
        return None


def _plan(config: Config, model: nn.Module) -> Plan:
    assert config.decompose is not None
    options = dataclasses.asdict(config.decompose)
    ranks = plan(
        model, config.method, config.rate, rate_decay=config.rate_decay, rate_scope=config.rate_scope, **options
    )
    if config.distill is not None:
        find_blocks(model, [layer.name for layer in ranks.tensorized], config.distill.blocks)
    return ranks


def _summary(ranks: Plan) -> str:
    before, after = ranks.dense_params, ranks.params
    count, dense = len(ranks.tensorized), len(ranks.layers) - len(ranks.tensorized)
    return f"plan       {ranks.method.name}, {count} layers {before:,} → {after:,} parameters, {dense} stay dense"


def _identity(config: Config, spec: NetworkSpec, reference: Reference) -> dict[str, Any]:
    """What everything in the run's directory depends on, as plain data."""
    return {
        "method": config.method.to_dict(),
        "rate": config.rate,
        "rate_decay": config.rate_decay,
        "rate_scope": config.rate_scope,
        "dataset": data_identity(config),
        "network": spec.to_dict(),
        "reference": reference.identity,
        "seed": config.seed,
    }
