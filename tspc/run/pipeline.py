"""One run, from its configuration to `result.json`: which phases run, in which order, and from which state."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from tspc.calibration.samples import Calibration, Samples
from tspc.compression.error_curve import Curves
from tspc.compression.integers import state_bytes
from tspc.compression.outline import Outline
from tspc.compression.settings import PlanSettings
from tspc.data import NO_DATA, Contiguous, Data, Given, load_data
from tspc.decompositions import resolve
from tspc.errors import ConfigError, DataError, RunError
from tspc.models import NetworkSpec
from tspc.pages import made, write_comparison, write_frontier
from tspc.phases.context import Context
from tspc.phases.frontier import FILE
from tspc.phases.judging import Judging, held_out_images, judges_of
from tspc.phases.phase import DeliveryPhase, NetworkPhase, ShowingPhase, Work
from tspc.phases.planning import Planning
from tspc.phases.table import DELIVERY_PHASES, FIRST, PHASES
from tspc.run.config import Config
from tspc.run.contract import known_drops
from tspc.run.fitting import fitted
from tspc.run.folders import elsewhere, run_folder, shared_folder
from tspc.run.job import Job
from tspc.run.machine import hardware, pick_device
from tspc.run.networks import Networks
from tspc.run.published import guessed_order, with_own_classes
from tspc.run.reference import (
    DATA_BY_DEFAULT,
    TRAINED_BY_DEFAULT,
    Pretrained,
    calibration_identity,
    data_identity,
    network_spec,
    reference_accuracy,
    reference_curves,
    train_reference,
    untrained_reference,
)
from tspc.run.result import finish
from tspc.run.trackers import tracked
from tspc.store.directory import RunDirectory
from tspc.store.files import DISK_FAULTS
from tspc.store.records import usual
from tspc.store.scores import TOP1, described
from tspc.system import processes
from tspc.system.launch import is_first
from tspc.terminal.display import Display
from tspc.training import Hardware, Recipe

LEFT = tuple(name for phase in DELIVERY_PHASES.values() for name in (phase.record, *phase.files))
"""Patterns of the files that phases leave in the run's directory, besides networks."""


def run(config: Config, display: Display) -> dict[str, Any]:
    """Does what the configuration asks for; returns the content of `result.json`.

    All settings are checked before anything is written. Raises TspcError.
    """
    try:
        return _done(config, display)
    except OSError as error:  # from a package that writes files itself, such as a tracker
        if error.errno not in DISK_FAULTS:
            raise
        where = error.filename or config.output_dir
        raise RunError(f"cannot use {where}: {error.strerror}; solve this, then run the same command again") from error


def _done(config: Config, display: Display) -> dict[str, Any]:
    if "compare" in config.phases:
        page = write_comparison(config.runs or str(config.output_dir))
        display.line(f"compared   {page}")
        return {"directory": str(page.parent), "page": str(page), "phases": {}}
    device = pick_device(config.device)
    processes.join(cpu=device.type == "cpu")
    with display.checklist(("reference", *(phase for phase in config.phases if phase != "pretrain"))):
        return _run(config, hardware(config, processes.own_device(device)), display)


def _run(config: Config, machine: Hardware, display: Display) -> dict[str, Any]:
    _check_batches(config)
    config = with_own_classes(config)
    phases = [PHASES[name] for name in config.phases]
    for phase in phases:
        phase.check(config.phases[phase.name])
    metric, data = config.judge(), _data(config, display)
    spec = network_spec(config, data)
    pretrained = untrained_reference(config, spec, data)
    if (warning := guessed_order(config, data)) is not None:
        display.warn(warning)
    trial = fitted(pretrained.model, data, spec, config, metric, display)
    if trial is not None:
        machine = dataclasses.replace(machine, layout=trial.layout)
        data = Contiguous(data) if data is not None and trial.layout == torch.contiguous_format else data
    trains = any(isinstance(phase, NetworkPhase) and phase.trains for phase in phases)
    judges = judges_of(config.planning, metric, data, config.calibration.samples, trains)
    reserved = 0 if data is not None and data.fresh_size else judges
    context = Context(data, machine, config.seed, display, metric=metric, task=config.task, reserved=reserved)
    shared = shared_folder(config, spec)

    def measured(sketch: Outline, samples: Samples | None) -> Curves:
        return reference_curves(pretrained, config, sketch, samples, context, shared)

    planning = Planning(config.planning, config.calibration, pretrained.model, spec, measured, _shown(config, data))
    if "plan" in config.phases or FIRST in config.phases:
        _announce(planning, config, display)
        if data is None and config.calibration.samples > 0:
            display.line(f"plan       no {config.task.inputs} for the calibration: only the weights are used")

    def prepared() -> dict[str, Any]:
        """Prepares the reference and runs the showing phases; returns the result's part on the reference."""
        summary = _prepare(pretrained, config, spec, context)
        for phase in phases:
            if isinstance(phase, ShowingPhase):
                work = Work(config.phases[phase.name], spec, pretrained.model, planning, context, shared)
                with processes.sharing():
                    phase.run(work)
                if is_first() and config.report and (shared / FILE).exists():
                    made(lambda: write_frontier(shared / FILE), display)
        return summary

    if not any(isinstance(phase, NetworkPhase | DeliveryPhase) for phase in phases):
        return {"directory": str(shared), "reference": prepared(), "phases": {}}
    identity = _identity(config, spec, pretrained, data)
    folder, defaults = run_folder(config, spec), _identity_by_default(config)
    aside = elsewhere(config, "variant=NAME or another output_dir")
    directory = RunDirectory(folder, identity, config.overwrite, elsewhere=aside, leaves=LEFT, defaults=defaults)
    if FIRST not in config.phases:
        processes.by_first(lambda: _require_first(directory, config))
    with directory:
        summary = prepared()
        noted_before = directory.lines
        with tracked(
            config.tracker, directory.path, directory.identity, directory.note, machine.is_cpu, noted_before
        ) as note:
            reference = context.place(pretrained.model).eval()
            noted = dataclasses.replace(context, note=note)
            judging = None
            if judges:
                known = known_drops(config, pretrained.identity, context, shared)
                judging = Judging(config.planning, held_out_images(reference, noted, judges), trains, known)
            job = Job(config, spec, reference, planning, noted, directory, state_bytes(reference), judging)
            networks = Networks(job)
            networks.make()
            return processes.by_first(lambda: finish(job, networks, summary))


def _check_batches(config: Config) -> None:
    """Raises ConfigError if a batch cannot be divided among the processes."""
    recipes = {f"phase.{name}": found for name, found in config.phases.items() if isinstance(found, Recipe)}
    if config.pretrained is None and config.pretrain_recipe is not None:
        recipes["dataset.pretrain"] = config.pretrain_recipe
    count = processes.count()
    problems = [
        f"{name}.batch_size={recipe.batch_size}: {count} processes share a batch; give a multiple of {count}"
        for name, recipe in recipes.items()
        if recipe.batch_size % count
    ]
    if problems:
        raise ConfigError(problems)


def _announce(planning: Planning, config: Config, display: Display) -> None:
    """Says what will be tensorized. Raises an error if the rate, the layers or the blocks are wrong."""
    settings, sketch = planning.settings, planning.sketch
    chosen = sketch.chosen
    for name, of_phase in config.phases.items():
        PHASES[name].check_network(of_phase, planning.reference, [layer.name for layer in chosen])
    dense = sum(layer.dense_size(sketch.unit) for layer in chosen)
    if settings.max_drop is not None:
        goal = f"the smallest network that loses at most {settings.max_drop:g} points"
        goal += f", with {settings.time_limit}" if settings.is_timed else ""
    elif settings.is_timed and settings.rate is None and settings.size is None:
        goal = f"the network that loses least with {settings.time_limit} in {settings.runtime}"
    elif settings.target_error is not None:
        goal = f"{dense:,} {sketch.unit} to an output error of {settings.target_error:g}"
    elif settings.decomposes:
        goal = f"at most {sketch.budget(sketch.rate):,} of their {dense:,} {sketch.unit}"
    else:
        goal = f"whole kernels in {settings.bits} bits"
    display.line(f"plan       {settings.method.name}, {len(chosen)} of {len(sketch.layers)} layers: {goal}")


def _require_first(directory: RunDirectory, config: Config) -> None:
    """Raises RunError if a later phase is asked for without the network of the first phase."""
    if directory.held_by_another() or not os.path.exists(directory.file(f"{FIRST}.safetensors")):
        later = ",".join(phase for phase in config.phases if phase != "pretrain")
        raise RunError(
            f"phase={','.join(config.phases)} needs a decomposed network of these settings, and {directory.path} has "
            f"none: run phase=[{FIRST},{later}]"
        )


def _prepare(reference: Pretrained, config: Config, spec: NetworkSpec, context: Context) -> dict[str, Any]:
    """Trains the reference if none was given, and measures it; returns the result's part on the reference."""
    folder = shared_folder(config, spec)
    if config.pretrained is None:
        train_reference(reference, config, spec, context, folder)
    accuracy = reference_accuracy(reference, config, context, folder)
    source = "random initial weights" if config.pretrained == "random" else config.pretrained or "trained here"
    text = f"{spec.name}, {source}: {described(accuracy, config.metric)}"
    context.display.finished("reference", text, accuracy)
    return {"accuracy": accuracy, "seconds": reference.seconds, "source": source}


def _data(config: Config, display: Display) -> Data | None:
    """The data set; None if there is none, and the run does not need one."""
    # With random weights data is read only if the user names a folder.
    unasked = config.pretrained == "random" and config.data_dir is None
    if not config.trains and (unasked or config.dataset.kind == NO_DATA):
        return None
    if config.dataset.kind == NO_DATA:
        raise DataError(f"phase={','.join(config.phases)} needs data: name a data set, for example dataset=imagefolder")
    try:
        if config.trains and processes.count() > 1:  # one downloads, all read
            processes.by_first(lambda: load_data(config.dataset, config.data_dir) and None)
        return load_data(config.dataset, config.data_dir, download=config.trains)
    except DataError as error:
        if config.trains or config.data_dir is not None:
            raise
        display.warn(f"accuracy will not be measured: {error}")
        return None


def _shown(config: Config, data: Data | None) -> Given | None:
    """An input that shows the sizes of the layers' inputs; None where the network's description tells the size."""
    if data is None or config.task.is_of_images:
        return None
    inputs, _ = next(iter(data.test_batches(1, torch.device("cpu"), limit=1)))
    return inputs


def _identity(config: Config, spec: NetworkSpec, reference: Pretrained, data: Data | None) -> dict[str, Any]:
    """The settings on which everything in the run's directory depends, as plain data."""
    # Not the default: so the fingerprints stay those of runs that know no metric.
    judged = {} if config.metric == TOP1 else {"metric": config.metric}
    planning = config.planning.identity
    if config.planning.max_drop is not None and data is not None and data.fresh_size:
        judged["contract"] = planning["contract"] | {"held_out": data.fresh_fingerprint}
    return (
        planning
        | judged
        | {
            "calibration": calibration_identity(config, data is not None),
            "dataset": data_identity(config),
            "network": spec.to_dict(),
            "reference": reference.identity,
            "seed": config.seed,
        }
    )


def _identity_by_default(config: Config) -> dict[str, Any]:
    """The values of those settings that have a default."""
    return PlanSettings(config.planning.method).identity | {
        "method": resolve(config.planning.method.name).to_dict(),
        "calibration": usual(Calibration),
        "dataset": DATA_BY_DEFAULT,
        "network": usual(NetworkSpec),
        "metric": TOP1,
        "reference": {"trained": TRAINED_BY_DEFAULT},
    }
