"""Tables and the result of a run as plain data."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tspc.compression.beside_rows import Line, lines
from tspc.compression.goals import bits_of
from tspc.compression.plan import LayerPlan, Plan
from tspc.errors import InfeasibleRateError
from tspc.quantization.grids import FULL
from tspc.store.scores import TOP1, described, scale_in, shown, top5_in

MAX_ROWS = 60
TEXT = ("layer", "kind", "shape", "ranks")
ERRORS = ("error", "output\nerror")


def versions() -> dict[str, str]:
    packages = ("tspc", "torch", "torchvision", "tensorly", "hydra-core")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def plan_table(
    plan: Plan, bytes_before: int, bytes_after: int, max_rows: int | None = MAX_ROWS, width: int = 100
) -> Table:
    """Every layer of the plan, what lies beside them, and totals.

    Sizes are parameters; with few bits or a budget in bytes they are bytes.

    `bytes_before` and `bytes_after` are those of the whole network. If there are more than `max_rows` layers, the
    middle ones are left out. If `width` is below 100 columns, the least important columns are left out.
    """
    table = Table(title=_title(plan), title_justify="left", caption=_totals(plan, bytes_before, bytes_after))
    table.caption_justify = "left"
    spare = {"kind", "error"} if width < 100 else set()
    sizes = ("bits", "bytes\nbefore", "bytes\nafter") if plan.counts_bytes else ("before", "after")
    columns = (*TEXT, *sizes, *ERRORS)
    kept = [place for place, name in enumerate(columns) if name not in spare]
    for name in (columns[place] for place in kept):
        is_text = name in TEXT
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    rows = list(plan.layers)
    shown = len(rows) if max_rows is None else min(len(rows), max_rows)
    for layer in rows[: (shown + 1) // 2]:
        table.add_row(*(_row(layer, plan.counts_bytes)[place] for place in kept))
    if shown < len(rows):
        table.add_row(f"… {len(rows) - shown} more, see tspc.log")
    for layer in rows[len(rows) - shown // 2 :]:
        table.add_row(*(_row(layer, plan.counts_bytes)[place] for place in kept))
    for line in lines(plan.beside):
        table.add_row(*(_beside(line, plan.counts_bytes)[place] for place in kept))
    return table


def _beside(line: Line, in_bytes: bool) -> tuple[str, ...]:
    shape, size = "×".join(map(str, line.shape)), f"{line.bytes if in_bytes else line.params:,}"
    sizes = ("", size, "") if in_bytes else (size, size)  # the bytes after are known for all of them together alone
    return escape(line.name), line.kind, shape, escape(f"dense: {line.reason}"), *sizes, *("" for _ in ERRORS)


def _title(plan: Plan) -> str:
    decay = "" if plan.rate_decay == "flat" else f", {plan.rate_decay}"
    widths = {layer.bits for layer in plan.budgeted}
    is_narrow = len(widths) == 1 and widths != {FULL}
    name = f"{plan.method.name} in {widths.pop()} bits" if is_narrow else plan.method.name
    if plan.rate_unit == "parameters":
        scope = "all parameters" if plan.rate_scope == "network" else "the tensorized layers"
        return f"Plan: {name} at rate {plan.rate:.4g} of {scope}, {plan.allocation}{decay}"
    if plan.method.name == "dense" and plan.rate == 1:  # the width alone makes it smaller
        return f"Plan: {name}"
    scope = "the network" if plan.rate_scope == "network" else "the tensorized layers"
    return f"Plan: {name} at {plan.rate:.4g} of the bytes of {scope}, {plan.allocation}{decay}"


def _totals(plan: Plan, bytes_before: int, bytes_after: int) -> Text:
    layers = ("layers in budget", plan.dense_params, plan.params, "parameters")
    network = ("whole network", plan.network_dense_params, plan.network_params, "parameters")
    if plan.counts_bytes:
        in_budget = ("layers in budget", plan.dense_bytes, plan.bytes, "bytes")
        budget = [layers, in_budget] if plan.rate_unit == "parameters" else [in_budget]
        rows = [*budget, network, ("whole network", bytes_before, bytes_after, "bytes")]
    else:
        rows = [layers, network, ("weights", bytes_before, bytes_after, "bytes")]
    return Text("\n".join(f"{n:<18}{a:>14,} → {b:>12,} {unit}  ({b / a:.4f})" for n, a, b, unit in rows), style="")


def _row(layer: LayerPlan, in_bytes: bool) -> tuple[str, ...]:
    shape = "×".join(map(str, layer.shape))
    errors = ("" if error is None else f"{error:.3f}" for error in (layer.error, layer.output_error))
    if in_bytes:  # the width has a column of its own
        form = f"{layer.ranks}, {layer.path}" if layer.rank and layer.path else layer.ranks
        sizes = str(layer.bits), f"{layer.dense_bytes:,}", f"{layer.bytes:,}"
    else:
        form, sizes = layer.form, (f"{layer.dense_params:,}", f"{layer.params:,}")
    form = form if layer.note is None else f"{form} ({layer.note})"
    return escape(layer.name), layer.kind, shape, escape(form), *sizes, *errors


def rates_table(
    plans: dict[float, Plan | InfeasibleRateError],
    macs: dict[float, float],
    seconds: dict[float, float] | None = None,
) -> Table:
    """Size and expected error at each rate: a row for each plan, or the reason why there is none.

    With few bits or a budget in bytes the sizes are bytes. `macs` is the share of the network's multiply-accumulates
    that is left at each rate; empty if it is unknown. `seconds` are those of a batch in the named runtime, if any.
    """
    table = Table(title="Rates, as expected before any training", title_justify="left")
    in_bytes = any(isinstance(plan, Plan) and plan.counts_bytes for plan in plans.values())
    sizes = ("bytes", "network\nbytes", "bits") if in_bytes else ("parameters", "network")
    costs = ["network\nMACs" if in_bytes else "network MACs"] if macs else []
    costs += ["expected\nms"] if seconds else []
    names = ("rate", "reached", *sizes, *costs, "output\nerror" if in_bytes else "output error")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layers", overflow="fold")
    for rate, plan in plans.items():
        if isinstance(plan, InfeasibleRateError):
            table.add_row(f"{rate:g}", *[""] * (len(names) - 1), f"cannot be met: at least {plan.smallest:g}")
            continue
        error = "" if plan.output_error is None else f"{plan.output_error:.3f}"
        counts = (f"{plan.params:,}", f"{plan.network_params:,}")
        if in_bytes:
            counts = f"{plan.bytes:,}", f"{plan.network_bytes:,}", _widths(plan)
        share = [f"{macs[rate]:.3f}"] if macs else []
        share += [f"{1000 * seconds[rate]:.3g}"] if seconds else []
        table.add_row(f"{rate:g}", f"{plan.rate_reached:.4f}", *counts, *share, error, _kinds(plan))
    return table


def times_table(points: Sequence[Any], dense: float, runtime: str) -> Table:
    """Expected milliseconds, bytes and errors of the networks that lose least at several speedups."""
    table = Table(title=f"Speedups in {runtime}, as expected; dense: {1000 * dense:.3g} ms", title_justify="left")
    for name in ("goal", "expected ms", "network bytes", "output error"):
        table.add_column(name, justify="left" if name == "goal" else "right", no_wrap=True)
    for point in points:
        error = "" if point.error is None else f"{point.error:.3f}"
        table.add_row(point.goal, f"{1000 * point.seconds:.3g}", f"{point.bytes:,}", error)
    if not points:
        table.add_row("none can be had", "", "", "")
    return table


def _widths(plan: Plan) -> str:
    """The smallest and the largest width of the layers that share the budget, as in "4 to 8"."""
    widths = [layer.bits for layer in plan.budgeted]
    return " to ".join(map(str, dict.fromkeys((min(widths), max(widths)))))


def _kinds(plan: Plan) -> str:
    """For each method the number of layers that take it."""
    names = Counter("dense" if layer.method is None else layer.method.name for layer in plan.budgeted)
    return ", ".join(f"{count} {name}" for name, count in names.most_common())


def result_table(result: dict[str, Any], counted: str = "images") -> Table:
    """Accuracy and seconds after each phase. `counted` are the inputs that were judged."""
    table = Table(title="Result", title_justify="left")
    top5 = any(top5_in(p["accuracy"]) is not None for p in result["phases"].values())
    table.add_column("phase")
    table.add_column(Text(scale_in(result["accuracy"] or result["reference"]["accuracy"]).label), justify="right")
    if top5:
        table.add_column("top-5", justify="right")
    table.add_column(counted, justify="right")
    table.add_column("seconds", justify="right")
    entries = {"reference": result["reference"]} | result["phases"]
    for name, entry in entries.items():
        accuracy = entry["accuracy"]
        fifth = ["" if (share := top5_in(accuracy)) is None else f"{100 * share:.2f} %"]
        images = f"{accuracy['images']:,}" if accuracy else ""
        seconds = "" if entry.get("seconds") is None else f"{entry['seconds']:.1f}"
        table.add_row(name, shown(accuracy), *(fifth if top5 else []), images, seconds)
    return table


def result_lines(result: dict[str, Any], target: Path) -> list[str]:
    """The rate reached, and the size of the network in the file `target`."""
    sizes, parameters = result["bytes"], result["parameters"]
    asked = f"{result['rate']} asked"
    timed = [f"{key}={result[key]}" for key in ("latency", "speedup") if result.get(key) is not None]
    if timed and result["rate"] == 1 and result.get("size") is None:
        asked = f"for {timed[0]}"
    if result.get("max_drop") is not None:
        asked = f"for a drop of at most {result['max_drop']:g} points"
    elif result.get("size") is not None:
        asked = f"for a size of at most {result['size']}"
    elif result["target_error"] is not None:
        asked = f"for an expected output error of at most {result['target_error']}"
    elif result["method"]["name"] == "dense" and result["rate"] == 1:
        asked = f"{bits_of(result)} bits asked"
    unit = " of the bytes" if result.get("rate_unit") == "bytes" else ""
    counts = f"{parameters['before']:,} → {parameters['after']:,} parameters"
    is_narrow = bits_of(result) != str(FULL)
    weights = f", {sizes['before']:,} → {sizes['after']:,} bytes;" if is_narrow else ","
    return [
        f"rate       {result['rate_reached']:.4f}{unit} reached, {asked}",
        f"network    {counts}{weights} {sizes['file']:,} bytes in {target}",
    ]


def _labelled(accuracy: dict[str, Any] | None) -> Text:
    """A number in a table of runs, with its label if it is not top-1."""
    return Text(shown(accuracy) if scale_in(accuracy).name == TOP1 else described(accuracy))


def sweep_table(records: list[dict[str, Any]]) -> Table:
    """One row for each job of a sweep, failed ones included."""
    table = Table(title="Sweep", title_justify="left")
    for name in ("job", "run"):
        table.add_column(name, overflow="fold")
    has_few_bits = any(bits_of(record.get("result") or {}) != str(FULL) for record in records)
    for name in ("reached", "reference", "final", "parameters", *(["bytes"] if has_few_bits else [])):
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
        reference = _labelled(result["reference"]["accuracy"]) if "reference" in result else ""
        final = _labelled(result["accuracy"]) if "accuracy" in result else ""
        row: list[str | Text] = [reached, reference, final, "" if parameters is None else f"{parameters['after']:,}"]
        if has_few_bits:
            row.append(f"{result['bytes']['after']:,}" if "bytes" in result else "")
        table.add_row(str(record["job"]), Text(f"{name}\n{result['directory']}"), *row)
    return table
