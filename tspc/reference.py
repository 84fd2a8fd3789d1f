"""The reference network of a run: read from a file, published, random, or trained once and shared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tspc import checkpoint
from tspc.config import Config
from tspc.data import Data
from tspc.errors import RunError
from tspc.files import read_json, write_json
from tspc.models import NetworkSpec
from tspc.models.weights import load_state, read_state
from tspc.phases.context import Context
from tspc.phases.finetune import train_classifier
from tspc.runs import RunDirectory, differences, file_digest, fingerprint
from tspc.training import Progress, evaluate, place


@dataclass
class Reference:
    """`identity` says where the weights come from, so that runs from other weights are told apart."""

    model: nn.Module
    identity: dict[str, Any]
    seconds: float | None = None


def network_spec(config: Config, data: Data | None) -> NetworkSpec:
    """The network to build; the number of classes comes from the data where the configuration leaves it open."""
    if config.network.num_classes is None and data is not None:
        return dataclasses.replace(config.network, num_classes=data.num_classes)
    return config.network


def untrained_reference(config: Config, spec: NetworkSpec) -> Reference:
    """The network with the weights that `pretrained` names; with seeded initial ones where it is null.

    Nothing is written. Raises WeightsError or ConfigError if the weights cannot be had or do not fit.
    """
    torch.manual_seed(config.seed if config.pretrained == "random" else 0)
    model = spec.build(pretrained=config.pretrained == "default")
    source = config.pretrained
    if source is None:
        return Reference(model, {"trained": _recipe_identity(config, spec)})
    if source == "random":
        return Reference(model, {"random": config.seed})
    if source == "default":
        return Reference(model, {"published": spec.name})
    load_state(model, read_state(source), f"pretrained={source}")
    return Reference(model, {"file": file_digest(Path(source))})


def _recipe_identity(config: Config, spec: NetworkSpec) -> dict[str, Any]:
    assert config.pretrain_recipe is not None
    return {
        "recipe": dataclasses.asdict(config.pretrain_recipe),
        "dataset": data_identity(config),
        "network": spec.to_dict(),
    }


def data_identity(config: Config) -> dict[str, Any]:
    """What of the data set's settings changes a result."""
    skipped = ("workers", "in_memory")
    return {k: _plain(v) for k, v in dataclasses.asdict(config.dataset).items() if k not in skipped}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def train_reference(reference: Reference, config: Config, spec: NetworkSpec, context: Context, folder: Path) -> None:
    """Trains the reference in `folder`, or reads the one that an earlier run of the sweep left there.

    Another process training it is waited for. Raises RunError if the folder holds a reference made
    otherwise and `overwrite` is not set.
    """
    assert config.pretrain_recipe is not None
    result = folder / "model.safetensors"
    identity = reference.identity["trained"]
    redo = config.overwrite and (config.phases == ("pretrain",) or _holds_other(folder, identity))
    display = context.display
    waiting = lambda: display.line(f"waiting for another run to finish the reference network in {folder}")  # noqa: E731
    with RunDirectory(folder, identity, overwrite=redo, on_wait=waiting) as run:
        if result.exists() and not redo:
            header, state = checkpoint.read(result)
            load_state(reference.model, state, str(result))
            reference.seconds = header["info"]["seconds"]
            display.line(f"reference  read from {result}")
            return
        place(reference.model, context.device)
        progress = Progress(run.file("progress.pt"), fingerprint(identity), config.checkpoint_seconds)
        # The reference does not depend on the run's seed: a sweep over seeds shares it.
        shared = dataclasses.replace(context, seed=0, note=run.note)
        train_classifier(reference.model, config.pretrain_recipe, shared, progress, "pretrain")
        reference.seconds = progress.seconds
        for stale in folder.glob("accuracy-*.json"):
            stale.unlink()
        checkpoint.save(reference.model, result, network=spec, info={"seconds": reference.seconds})
        progress.discard()


def _holds_other(folder: Path, identity: dict[str, Any]) -> bool:
    path = folder / "run.json"
    return path.exists() and bool(differences(read_json(path), identity))


def reference_accuracy(reference: Reference, config: Config, context: Context, folder: Path) -> dict[str, Any] | None:
    """Accuracy on the whole test split, measured once for all runs that share the reference; None without data."""
    if context.data is None or config.pretrained == "random":
        return None
    identity = {"reference": reference.identity, "dataset": data_identity(config)}
    path = folder / f"accuracy-{fingerprint(identity)}.json"
    if path.exists():
        return read_json(path)
    place(reference.model, context.device).eval()
    accuracy = evaluate(reference.model, context.data, context.device).to_dict()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {folder}: {error.strerror}; choose another output_dir") from error
    write_json(path, accuracy)
    return accuracy
