"""Writes the page of every key in conf/, with its meaning, type, unit and default.

The meaning is the comment beside the key, in its own file or in another file of the group. Keys without any comment are
explained here. The type comes from the settings class, if there is one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GROUPS = ("phase", "method", "task", "dataset", "model", "hydra/launcher")
TITLES = {
    "config": "General",
    "phase": "phase=",
    "method": "method=",
    "task": "task=",
    "dataset": "dataset=",
    "model": "model=",
    "hydra/launcher": "hydra/launcher=",
}

MEANINGS = {
    "rate_decay": "How a uniform rate changes with depth.",
    "method.name": "The method of decomposition.",
    "task.name": "The task.",
    "dataset.kind": "How the data is read.",
    "dataset.name": "Name of the data set, also in the path of its runs.",
    "dataset.num_classes": "Number of classes.",
    "dataset.channels": "Channels of an image.",
    "dataset.image_size": "Height and width of an image.",
    "dataset.mean": "Mean of each channel, for normalising.",
    "dataset.std": "Standard deviation of each channel, for normalising.",
    "dataset.pad": "Padding before the random crop of training.",
    "dataset.flip": "Whether training mirrors images at random.",
    "dataset.in_memory": "Whether all images are decoded once and kept.",
    "dataset.resize": "Shorter side before the centre crop.",
    "dataset.workers": "Processes that decode images.",
    "dataset.options": "Settings of this kind of data only.",
    "dataset.options.torchvision": "The class of torchvision that downloads the files.",
    "dataset.options.train": "Number of training images to make.",
    "dataset.options.test": "Number of test images to make.",
    "dataset.model.family": "Family of the usual network for this data.",
    "dataset.model.name": "The usual network for this data.",
    "dataset.pretrained": "Default of the general key pretrained.",
    "dataset.batch_size": "Default of the general key batch_size.",
    "dataset.epochs": "Default of the general key epochs.",
    "dataset.learning_rate": "Default of phase.finetune.learning_rate.",
    "dataset.pretrain": "The recipe that trains a reference; null: there is none.",
    "model.family": "Where the network comes from.",
    "model.name": "Which network of the family.",
    "model.factory": "Your function, as package.module:function.",
    "model.kwargs": "Arguments of the function that makes the network.",
    "hydra/launcher.n_jobs": "Number of jobs at once.",
    "hydra/launcher.gpus_per_node": "GPUs of a job.",
    "hydra/launcher.cpus_per_task": "CPU cores of a job.",
    "hydra/launcher.mem_gb": "Memory of a job.",
    "seed": "Seed of everything random.",
    "output_dir": "Folder for the runs.",
    "calibration.batch_size": "Images at a time.",
    "phase.pretrain": "No keys: the recipe belongs to the data set.",
    "phase.compare": "No keys: see runs.",
    "epochs": "Passes over the data.",
    "batch_size": "Images of a step, all processes together.",
    "learning_rate": "Highest learning rate of the optimizer.",
    "momentum": "Momentum of SGD.",
    "weight_decay": "Weight decay of the optimizer.",
    "optimizer": "sgd or adam.",
    "label_smoothing": "Share of the label's weight that goes to all classes.",
}
"""Meanings by full key, or by the key's last part if it means the same everywhere."""

UNITS = {
    "memory": "MB",
    "mem_gb": "GB",
    "checkpoint_seconds": "seconds",
    "seconds": "seconds",
    "timeout_min": "minutes",
    "signal_delay_s": "seconds",
    "image_size": "pixels",
    "resize": "pixels",
    "pad": "pixels",
    "length": "tokens",
    "samples": "images",
    "images": "images",
    "held_out": "images",
    "eval_samples": "images",
    "batch_size": "images",
    "batch_sizes": "images",
    "epochs": "passes",
    "steps": "optimizer steps",
    "max_iterations": "sweeps",
    "warmup": "share of the steps",
    "rate": "share of the parameters",
    "rates": "shares of the parameters",
    "target_error": "relative error",
    "size": "bytes with a unit, or a share of the float32 network",
    "bits": "bits of an entry",
    "patches": "patches",
    "max_component_norm": "multiples of the kernel's norm",
    "workers": "processes",
    "n_jobs": "jobs",
}


@dataclass(frozen=True)
class Key:
    """One key. `option` is the file in its group, None for a general key."""

    group: str
    option: str | None
    name: str
    default: Any
    comment: str
    kind: str

    @property
    def unit(self) -> str:
        return UNITS.get(self.name.rpartition(".")[2], "")


def keys() -> list[Key]:
    """All keys of conf/. Raises LookupError for a key without a meaning."""
    found = _file(CONF / "config.yaml", "config", None)
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            found += _file(path, group, path.stem)
    beside = {(key.group, key.name): key.comment for key in found if key.comment}
    return [dataclasses.replace(key, comment=_meaning(key, beside)) for key in found]


def page() -> str:
    """The reference as Markdown."""
    lines = ["# Configuration", "", "Made from the files in `conf/` and the classes that check them. "]
    lines += ["Keys are given as `tspc KEY=VALUE`; those of a group as `tspc GROUP.KEY=VALUE`.", ""]
    last: tuple[str, str | None] | None = None
    for key in keys():
        if (key.group, key.option) != last:
            if last is None or key.group != last[0]:
                lines += ["", f"## {TITLES[key.group]}"]
            if key.option:
                lines += ["", f"### {key.option}"]
            lines += ["", "| key | meaning | type | unit | default |", "|---|---|---|---|---|"]
            last = (key.group, key.option)
        cells = (f"`{key.name}`", key.comment, key.kind, key.unit, f"`{_shown(key.default)}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _file(path: Path, group: str, option: str | None) -> list[Key]:
    text = path.read_text()
    data, comments = yaml.safe_load(text) or {}, dict(_comments(text))
    is_whole = "@package _global_" in text  # its keys are written out in full
    result = []
    for name, value in _leaves({k: v for k, v in data.items() if k not in ("defaults", "hydra")}, group):
        # The files of the phases hold the phase's own name; those of the other groups do not.
        full = name if is_whole or group in ("config", "phase") else f"{group.split('/')[-1]}.{name}"
        full = f"phase.{name}" if group == "phase" else full
        result.append(Key(group, option, full, value, comments.get(name, ""), _kind(full, value)))
    return result


def _leaves(data: dict[str, Any], group: str, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, group, f"{name}.")
        else:
            yield name, value


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """Dotted key → the comment on its line."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):(?:\s|$)[^#]*(?:#\s*(.*))?$", line)
        if match is None:
            continue
        depth = len(match[1])
        above = [entry for entry in above if entry[0] < depth]
        above.append((depth, match[2]))
        if match[3]:
            yield ".".join(name for _, name in above), match[3].strip()


def _meaning(key: Key, beside: dict[tuple[str, str], str]) -> str:
    short, group = key.name.rpartition(".")[2], key.group
    tail = key.name.partition(".")[2]
    own = key.comment or beside.get((group, key.name))
    general = MEANINGS.get(key.name) or MEANINGS.get(f"{group}.{tail}") or MEANINGS.get(short)
    anywhere = next((text for (_, name), text in beside.items() if name.rpartition(".")[2] == short), None)
    found = own or general or anywhere
    if not found:
        raise LookupError(f"{key.name} in conf/{group} has no meaning: comment it there")
    return found.rstrip(".") if found[:2].isupper() else found[:1].lower() + found[1:].rstrip(".")


def _kind(name: str, value: Any) -> str:
    """The type: from the field of the settings class if there is one, else from the default."""
    from tspc.calibration.samples import Calibration
    from tspc.compression.settings import PlanSettings
    from tspc.data import DataSpec, OwnSpec, TextSpec
    from tspc.phases.table import PHASES
    from tspc.run.config import Config
    from tspc.training import Recipe, Task

    hints = {f.name: f.type for cls in (Config, PlanSettings) for f in dataclasses.fields(cls)}
    section, _, field = name.rpartition(".")
    classes: dict[str, type] = {"calibration": Calibration, "task": Task, "dataset.pretrain": Recipe}
    specs = (DataSpec, TextSpec, OwnSpec)
    classes["dataset"] = next((c for c in specs if field in {f.name for f in dataclasses.fields(c)}), DataSpec)
    if section.startswith("phase."):
        classes[section] = PHASES[section.removeprefix("phase.")].settings
    if section in classes:
        hints = {f.name: f.type for f in dataclasses.fields(classes[section])}
    hint = str(hints.get(field or name, "")) if section in classes or not section else ""
    plain = {"Path": "path", "bool": "true/false", "str": "text", "int": "whole number", "float": "number"}
    parts = [plain.get(part.strip(), part.strip()) for part in hint.split("|")] if hint else []
    known = [p for p in parts if p in (*plain.values(), "None") or p.startswith("tuple")]
    if known and len(known) == len(parts):
        return " or ".join("null" if p == "None" else "list" if p.startswith("tuple") else p for p in known)
    names = {bool: "true/false", int: "whole number", float: "number", list: "list", dict: "group"}
    return names.get(type(value), "text" if isinstance(value, str) and "${" not in value else "")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
