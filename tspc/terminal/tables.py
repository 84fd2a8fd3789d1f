"""Tables and the result of a run as plain data."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tspc.compression.plan import LayerPlan, Plan
from tspc.errors import InfeasibleRateError

MAX_ROWS = 60
COLUMNS = ("layer", "kind", "shape", "ranks", "before", "after", "error", "output\nerror")


def versions() -> dict[str, str]:
    packages = ("tspc", "torch", "torchvision", "tensorly", "hydra-core")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def plan_table(
    plan: Plan, bytes_before: int, bytes_after: int, max_rows: int | None = MAX_ROWS, width: int = 100
) -> Table:
    """Every layer of the plan, and totals.

    If there are more than `max_rows` layers, the middle ones are left out. If `width` is below 100 columns, the least
    important columns are left out.
    """
    table = Table(title=_title(plan), title_justify="left", caption=_totals(plan, bytes_before, bytes_after))
    table.caption_justify = "left"
    spare = {"kind", "error"} if width < 100 else set()
    names = [name for name in COLUMNS if name not in spare]
    for name in names:
        is_text = name in COLUMNS[:4]
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    kept = [place for place, name in enumerate(COLUMNS) if name in names]
    rows = list(plan.layers)
    shown = len(rows) if max_rows is None else min(len(rows), max_rows)
    for layer in rows[: (shown + 1) // 2]:
        table.add_row(*(_row(layer)[place] for place in kept))
    if shown < len(rows):
        table.add_row(f"… {len(rows) - shown} more, see tspc.log")
    for layer in rows[len(rows) - shown // 2 :]:
        table.add_row(*(_row(layer)[place] for place in kept))
    return table


def _title(plan: Plan) -> str:
    decay = "" if plan.rate_decay == "flat" else f", {plan.rate_decay}"
    what = "rate" if plan.rate_unit == "parameters" else "a share of bytes of"
    return f"Plan: {plan.method.name} at {what} {plan.rate:.4g} of {_scope(plan)}, {plan.allocation}{decay}"


def _scope(plan: Plan) -> str:
    return f"all {plan.rate_unit}" if plan.rate_scope == "network" else "the tensorized layers"


def _totals(plan: Plan, bytes_before: int, bytes_after: int) -> Text:
    rows = [
        ("layers in budget", plan.dense_params, plan.params, "parameters"),
        ("whole network", plan.network_dense_params, plan.network_params, "parameters"),
        ("weights", bytes_before, bytes_after, "bytes"),
    ]
    return Text("\n".join(f"{n:<18}{a:>14,} → {b:>12,} {unit}  ({b / a:.4f})" for n, a, b, unit in rows), style="")


def _row(layer: LayerPlan) -> tuple[str, ...]:
    shape = "×".join(map(str, layer.shape))
    errors = ("" if error is None else f"{error:.3f}" for error in (layer.error, layer.output_error))
    before, after = f"{layer.dense_params:,}", f"{layer.params:,}"
    form = layer.form if layer.note is None else f"{layer.form} ({layer.note})"
    return escape(layer.name), layer.kind, shape, escape(form), before, after, *errors


def rates_table(plans: dict[float, Plan | InfeasibleRateError], macs: dict[float, float]) -> Table:
    """Size and expected error at each rate: a row for each plan, or the reason why there is none.

    `macs` is the share of the network's multiply-accumulates that is left at each rate; empty if it is unknown.
    """
    table = Table(title="Rates, as expected before any training", title_justify="left")
    names = ("rate", "reached", "parameters", "network", *(["network MACs"] if macs else []), "output error")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layers", overflow="fold")
    for rate, plan in plans.items():
        if isinstance(plan, InfeasibleRateError):
            table.add_row(f"{rate:g}", *[""] * (len(names) - 1), f"cannot be met: at least {plan.smallest:g}")
            continue
        error = "" if plan.output_error is None else f"{plan.output_error:.3f}"
        counts = f"{plan.params:,}", f"{plan.network_params:,}"
        share = [f"{macs[rate]:.3f}"] if macs else []
        table.add_row(f"{rate:g}", f"{plan.rate_reached:.4f}", *counts, *share, error, _kinds(plan))
    return table


def _kinds(plan: Plan) -> str:
    """For each method the number of layers that take it."""
    names = Counter("dense" if layer.method is None else layer.method.name for layer in plan.budgeted)
    return ", ".join(f"{count} {name}" for name, count in names.most_common())


def percent(accuracy: dict[str, Any] | None) -> str:
    return "not measured" if accuracy is None else f"{100 * accuracy['top1']:.2f} %"


def result_table(result: dict[str, Any]) -> Table:
    """Accuracy and seconds after each phase."""
    table = Table(title="Result", title_justify="left")
    top5 = any((p["accuracy"] or {}).get("top5") is not None for p in result["phases"].values())
    table.add_column("phase")
    table.add_column("top-1", justify="right")
    if top5:
        table.add_column("top-5", justify="right")
    table.add_column("images", justify="right")
    table.add_column("seconds", justify="right")
    entries = {"reference": result["reference"]} | result["phases"]
    for name, entry in entries.items():
        accuracy = entry["accuracy"]
        fifth = [f"{100 * accuracy['top5']:.2f} %" if accuracy and accuracy.get("top5") is not None else ""]
        images = f"{accuracy['images']:,}" if accuracy else ""
        seconds = "" if entry.get("seconds") is None else f"{entry['seconds']:.1f}"
        table.add_row(name, percent(accuracy), *(fifth if top5 else []), images, seconds)
    return table


def result_lines(result: dict[str, Any], target: Path) -> list[str]:
    """The rate reached, and the size of the network in the file `target`."""
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    asked = f"{result['rate']} asked"
    if result.get("size") is not None:
        asked = f"for a size of at most {result['size']}"
    elif result["target_error"] is not None:
        asked = f"for an expected output error of at most {result['target_error']}"
    return [
        f"rate       {result['rate_reached']:.4f} reached, {asked}",
        f"network    {before:,} → {after:,} parameters, {result['bytes']['file']:,} bytes in {target}",
    ]


def sweep_table(records: list[dict[str, Any]]) -> Table:
    """One row for each job of a sweep, failed ones included."""
    table = Table(title="Sweep", title_justify="left")
    for name in ("job", "run"):
        table.add_column(name, overflow="fold")
    for name in ("reached", "reference", "final", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    # Settings that all jobs share are left out.
    common = set.intersection(*(set(record["overrides"]) for record in records)) if len(records) > 1 else set()
    told: dict[str, int] = {}
    for record in records:
        result = record.get("result")
        name = " ".join(o for o in record["overrides"] if o not in common) or "(defaults)"
        if result is None:
            first = told.setdefault(record["error"], record["job"])
            why = record["error"] if first == record["job"] else f"as job {first}"
            table.add_row(str(record["job"]), Text(f"{name}\nFAILED: {why}", style="red"))
            continue
        parameters = result.get("parameters")
        reached = f"{result['rate_reached']:.4f}" if "rate_reached" in result else ""
        reference = percent(result["reference"]["accuracy"]) if "reference" in result else ""
        final = percent(result["accuracy"]) if "accuracy" in result else ""
        row = (reached, reference, final, "" if parameters is None else f"{parameters['after']:,}")
        table.add_row(str(record["job"]), Text(f"{name}\n{result['directory']}"), *row)
    return table
