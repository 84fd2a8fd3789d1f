"""Which phases run, in which order, from which state: a run from its configuration to `result.json`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tspc.compression.outline import outline
from tspc.compression.planning import plan
from tspc.data import NO_DATA, Contiguous, Data, load_data
from tspc.decompositions import resolve
from tspc.errors import ConfigError, DataError, RunError
from tspc.models import NetworkSpec
from tspc.pages import write_comparison
from tspc.phases.context import Context
from tspc.phases.decompose import calibration_samples, example_input
from tspc.phases.plan import macs_at, plans_at
from tspc.run.config import Config
from tspc.run.delivery import RECORDS
from tspc.run.reference import (
    Reference,
    calibration_identity,
    data_identity,
    network_spec,
    reference_accuracy,
    reference_curves,
    train_reference,
    untrained_reference,
)
from tspc.run.stages import STAGES, Stages
from tspc.run.trackers import tracked
from tspc.store.directory import RunDirectory
from tspc.store.files import DISK_FAULTS
from tspc.system import processes
from tspc.terminal.display import Display
from tspc.terminal.tables import percent, plan_table, rates_table, state_bytes
from tspc.training import Hardware, Trial, tried
from tspc.traversal.blocks import find_blocks


def run(config: Config, display: Display) -> dict[str, Any]:
    """Does what the configuration asks for; returns what `result.json` holds.

    Everything that can be wrong is checked before anything is written. Raises TspcError.
    """
    try:
        return _done(config, display)
    except OSError as error:  # of a package that writes by itself, as trackers do
        if error.errno not in DISK_FAULTS:
            raise
        where = error.filename or config.output_dir
        raise RunError(f"cannot use {where}: {error.strerror}; mend that and run the same command again") from error


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
    if config.export is not None:
        config.export.check()
    data = _data(config, display)
    spec = network_spec(config, data)
    reference = untrained_reference(config, spec, data)
    trial = _fitted(reference.model, data, spec, config, display)
    if trial is not None:
        machine = dataclasses.replace(machine, layout=trial.layout)
        data = Contiguous(data) if data is not None and trial.layout == torch.contiguous_format else data
    if config.plan is not None or config.decompose is not None:
        _outline(config, reference.model, display)
        if data is None and config.calibration.samples > 0:
            display.line("plan       no data to calibrate with: the weights alone decide")
    context = Context(data, machine, config.seed, display)
    shared = _shared(config, spec)
    if not set(config.phases) & {*STAGES, *RECORDS}:
        summary = _prepare(reference, config, spec, context)
        if config.plan is not None:
            processes.by_first(lambda: _show_plans(reference, config, context, shared))
        return {"directory": str(shared), "reference": summary, "phases": {}}
    directory = RunDirectory(run_path(config, spec), _identity(config, spec, reference, data), config.overwrite)
    if config.decompose is None:
        processes.by_first(lambda: _require_decomposed(directory, config))
    with directory:
        summary = _prepare(reference, config, spec, context)
        if config.plan is not None:
            processes.by_first(lambda: _show_plans(reference, config, context, shared))
        noted_before = directory.lines
        with tracked(
            config.tracker, directory.path, directory.identity, directory.note, machine.is_cpu, noted_before
        ) as note:
            noted = dataclasses.replace(context, note=note)
            return Stages(config, spec, reference, noted, directory, shared).execute(summary)


def _check_batches(config: Config) -> None:
    """Raises ConfigError if a batch cannot be shared out among the processes."""
    recipes = {"phase.distill": config.distill, "phase.finetune": config.finetune}
    if config.pretrained is None:
        recipes["dataset.pretrain"] = config.pretrain_recipe
    count = processes.count()
    problems = [
        f"{name}.batch_size={recipe.batch_size}: {count} processes share it, take a multiple of {count}"
        for name, recipe in recipes.items()
        if recipe is not None and recipe.batch_size % count
    ]
    if problems:
        raise ConfigError(problems)


def _outline(config: Config, model: nn.Module, display: Display) -> None:
    """Says what will be tensorized; raises what is wrong with the rate, the layers or the blocks."""
    planning = config.planning
    sketch = outline(model, planning)
    chosen = sketch.chosen
    if config.distill is not None:
        find_blocks(model, [layer.name for layer in chosen], config.distill.blocks)
    dense = sum(layer.dense_params for layer in chosen)
    if planning.target_error is None:
        goal = f"at most {sketch.budget(planning.rate):,} of {dense:,} parameters"
    else:
        goal = f"{dense:,} parameters to an output error of {planning.target_error:g}"
    display.line(f"plan       {planning.method.name}, {len(chosen)} of {len(sketch.layers)} layers: {goal}")


def _show_plans(reference: Reference, config: Config, context: Context, shared: Path) -> None:
    assert config.plan is not None
    with calibration_samples(config.calibration, context) as samples:
        curves = reference_curves(reference, config, samples, context, shared)
    example = example_input(reference.model, network_spec(config, context.data))
    asked = plan(reference.model, config.planning, curves=curves, example=example)
    plans = plans_at(reference.model, config.planning, config.plan, asked, curves, example)
    size = state_bytes(reference.model)
    entry = next(p.element_size() for p in reference.model.parameters())
    after = size - entry * (asked.network_dense_params - asked.network_params)
    width = context.display.console.width
    context.display.show(
        plan_table(asked, size, after, width=width), logged=plan_table(asked, size, after, max_rows=None)
    )
    context.display.show(rates_table(plans, macs_at(reference.model, plans, example)))


def _require_decomposed(directory: RunDirectory, config: Config) -> None:
    """A run that starts with a later phase needs what `decompose` left; overwriting does not make it."""
    if directory.held_by_another() or not os.path.exists(directory.file("decompose.safetensors")):
        later = ",".join(phase for phase in config.phases if phase != "pretrain")
        raise RunError(
            f"phase={','.join(config.phases)} needs a decomposed network of these settings, and {directory.path} has "
            f"none: run phase=[decompose,{later}]"
        )


def _fitted(model: nn.Module, data: Data | None, spec: NetworkSpec, config: Config, display: Display) -> Trial | None:
    """Runs two images through the network, in both layouts; says where it takes one of them only.

    Without data they are random ones of the size that the network takes; None if that is not known. Raises ConfigError
    if the network cannot take the images of the data set, or answers otherwise.
    """
    if data is not None:
        images, _ = next(iter(data.test_batches(2, torch.device("cpu"), limit=2)))
        _check_size(images, config)
    else:
        example = example_input(model, spec)
        if example is None or spec.family in ("builtin", "torchvision"):  # which take any layout
            return None
        images = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    trial = tried(model, images, trains=data is not None and config.trains)
    if trial.reason:
        display.warn(f"{spec.name} runs on contiguous images: channels last is faster, but there {trial.reason}")
    if data is not None:
        _check_answer(trial, images, data, spec)
    return trial


def _check_size(images: Tensor, config: Config) -> None:
    """Raises ConfigError if the data's images are not as large as the settings say."""
    size = config.dataset.image_size
    if tuple(images.shape[-2:]) != (size, size):
        found = "×".join(map(str, images.shape[-2:]))
        raise ConfigError([f"dataset.image_size={size}, but {config.dataset.name} has images of {found} pixels"])


def _check_answer(trial: Trial, images: Tensor, data: Data, spec: NetworkSpec) -> None:
    shape = getattr(trial.answer, "shape", None)
    if trial.error is not None or shape is None:
        reason = trial.error or f"it answers with {type(trial.answer).__name__}, not one tensor"
        raise ConfigError(
            [f"{spec.name} cannot take the data set's images of shape {tuple(images.shape[1:])}: {reason}"]
        ) from trial.error
    if tuple(shape) != (len(images), data.num_classes):
        raise ConfigError(
            [f"{spec.name} answers with {tuple(shape)[1:]} values an image; the data has {data.num_classes} classes"]
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
    text = f"{spec.name}, {source}: top-1 {percent(accuracy)}"
    context.display.finished("reference", text, None if accuracy is None else accuracy["top1"])
    return {"accuracy": accuracy, "seconds": reference.seconds, "source": source}


def hardware(config: Config, device: torch.device) -> Hardware:
    """The device and the precision of training; `auto` takes bfloat16 on GPUs that have it, float32 elsewhere."""
    if config.precision == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(device, torch.bfloat16 if has_bfloat16 else None, config.compile)
    return Hardware(device, None if config.precision == "float32" else getattr(torch, config.precision), config.compile)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError if it is absent."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # a device that holds no values, such as meta, gives none back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"device={name} cannot be used here ({reason}); use device=auto or cpu"]) from error
    return device


def run_path(config: Config, spec: NetworkSpec) -> Path:
    """`<output_dir>/<dataset>/<network>/<method>-<rate>/seed<seed>`; settings of the method, allocation, multiple,
    decay and scope that depart from the defaults are appended to the rate, and so is `variant`."""
    planning = config.planning
    settings = planning.method.to_dict()
    defaults = resolve(settings["name"]).to_dict()
    goal = f"{planning.rate:g}" if planning.target_error is None else f"error{planning.target_error:g}"
    parts = [f"{settings['name']}-{goal}"]
    parts += [f"{key}{_brief(value)}" for key, value in settings.items() if value != defaults[key]]
    parts += [planning.allocation] if planning.allocation != "global" else []
    parts += [f"multiple{planning.rank_multiple}"] if planning.rank_multiple != 1 else []
    parts += [planning.rate_decay] if planning.rate_decay != "flat" else []
    parts += ["network"] if planning.rate_scope == "network" else []
    parts += [config.variant] if config.variant else []
    return config.output_dir / config.dataset.name / spec.name / "-".join(parts) / f"seed{config.seed}"


def _brief(value: Any) -> str:
    """A method's setting in a directory's name: of `auto`'s candidates their names."""
    return "+".join(member["name"] for member in value) if isinstance(value, list) else str(value)


def _data(config: Config, display: Display) -> Data | None:
    """The data set; None where only the weights matter and there is none."""
    # Random weights ask for no data; a folder that is named is read.
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


def _identity(config: Config, spec: NetworkSpec, reference: Reference, data: Data | None) -> dict[str, Any]:
    """What everything in the run's directory depends on, as plain data."""
    return config.planning.identity | {
        "calibration": calibration_identity(config, data is not None),
        "dataset": data_identity(config),
        "network": spec.to_dict(),
        "reference": reference.identity,
        "seed": config.seed,
    }
