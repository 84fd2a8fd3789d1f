"""Finds settings that the user gave, but that have no effect together with other settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tspc.compression.goals import Terms
from tspc.data import KINDS_IN_FOLDERS
from tspc.phases.table import NETWORK_PHASES
from tspc.system.bounds import shown

CALIBRATION = ("batch_size", "patches", "damping", "sensitivity", "compensate", "batch_norm", "memory")
RECIPES = (*(f"phase.{name}" for name, phase in NETWORK_PHASES.items() if phase.trains), "dataset.pretrain")


def without_effect(raw: dict[str, Any], given: Iterable[str]) -> list[str]:
    """One line for each of the `given` keys that has no effect, with the reason."""
    wanted = set(given)
    return [
        f"{key}={shown(_at(raw, key))} has no effect with {reason}; leave it out"
        for key, reason in _idle(raw)
        if key in wanted
    ]


def _idle(raw: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The keys that have no effect in this configuration, each with the setting that is the reason."""
    if _at(raw, "calibration.samples") == 0:
        yield from ((f"calibration.{key}", "calibration.samples=0") for key in CALIBRATION)
    for recipe in RECIPES:
        if _at(raw, f"{recipe}.optimizer") == "adam":
            yield f"{recipe}.momentum", f"{recipe}.optimizer=adam"
        if _at(raw, f"{recipe}.steps") is not None:
            yield f"{recipe}.epochs", f"{recipe}.steps={shown(_at(raw, f'{recipe}.steps'))}"
        if recipe != "phase.distill" and _at(raw, f"{recipe}.held_out") in (0, None):
            yield f"{recipe}.evaluations", f"{recipe}.held_out=0"
    # The plan phase times layers in a runtime that is named, without a goal.
    times_paths = _at(raw, "objective") == "latency" or _at(raw, "phase.plan") is not None
    yield from ((f"contract.{key}", reason) for key, reason in Terms.idle(raw, times_paths).items())
    yield from _idle_of_finetuning(raw)
    yield from _idle_of_task(raw)
    if _at(raw, "dataset.kind") not in KINDS_IN_FOLDERS:
        yield "dataset.in_memory", f"dataset {shown(_at(raw, 'dataset.name'))}"
    is_streamed = _at(raw, "dataset.kind") == "folder" and _at(raw, "dataset.in_memory") is False
    if is_streamed:
        yield "dataset.pad", "dataset.in_memory=false"
    else:
        yield from ((f"dataset.{key}", "images that are all kept in memory") for key in ("resize", "workers"))


def _idle_of_finetuning(raw: dict[str, Any]) -> Iterable[tuple[str, str]]:
    share, features = (_at(raw, f"phase.finetune.{key}") for key in ("distillation", "features"))
    if share == 0:
        yield "phase.finetune.temperature", "phase.finetune.distillation=0"
        if features == 0:
            yield "phase.finetune.careful_below", "phase.finetune.distillation=0 and features=0"
    if share == 1:
        yield "phase.finetune.label_smoothing", "phase.finetune.distillation=1"


def _idle_of_task(raw: dict[str, Any]) -> Iterable[tuple[str, str]]:
    task, answers, loss = (_at(raw, f"task.{key}") for key in ("name", "answers", "loss"))
    reason = f"task={task}" if loss is None else f"task.loss={loss}"
    if answers == "embeddings" and loss is None:
        yield "phase.finetune.distillation", f"task={task}, whose data has no targets"
    if answers in ("embeddings", "values"):
        yield "phase.finetune.temperature", f"task.answers={answers}"
    if answers in ("embeddings", "values") or loss is not None:
        yield from ((f"{recipe}.label_smoothing", reason) for recipe in RECIPES)


def _at(raw: dict[str, Any], key: str) -> Any:
    node: Any = raw
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
