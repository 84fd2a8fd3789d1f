"""The figures of one run: accuracy by phase, training curves, parameters layer by layer, spectra."""

from __future__ import annotations

from typing import Any

from tspc.compression.plan import Plan
from tspc.pages.benchmark import readable_bytes
from tspc.pages.drawing import GRID, MUTED, SERIES, SOFT, Drawing, Mark, accuracy_axis, canvas, legible, plain_log_axis
from tspc.pages.records import REFERENCE, Run
from tspc.phases.table import NETWORK_PHASES
from tspc.store.scores import value_in

NAMED = 40
"""The largest number of layers with names that fit below an axis."""
SPECTRA = 24
"""The largest number of layers with drawn spectra; the others are in the page's table and in spectra.json."""
ROOM = 0.05
"""The room above a mark for its number, as a share of the axis; a mark at 100 % has less."""
COLUMNS = 6
POINTS = 64
"""The largest number of points of a spectrum's curve."""


def run_drawings(run: Run) -> list[Drawing]:
    """All figures for which the run's files have data."""
    drawings = [_accuracy(run), *_training(run)]
    if run.plan is not None:
        drawings.append(_layers(run.plan))
    if run.spectra:
        drawings.append(_spectra(run))
    return [drawing for drawing in drawings if drawing is not None]


def _accuracy(run: Run) -> Drawing | None:
    assert run.result is not None
    entries = {REFERENCE: run.result["reference"]} | run.result["phases"]
    scale = run.scale
    measured = {name: e["accuracy"] for name, e in entries.items() if e["accuracy"] is not None}
    shown = {name: scale.points(value_in(accuracy)) for name, accuracy in measured.items()}
    if not shown:
        return None
    figure, grid = canvas(4.6, 2.9, bottom=0.35)
    axes = grid[0, 0]
    names, values = list(shown), list(shown.values())
    start = 1 if names[0] == REFERENCE else 0
    if start:
        axes.axhline(values[0], color=MUTED, linestyle="--", linewidth=1)
    axes.plot(range(start, len(values)), values[start:], color=SERIES[0], linewidth=1.5)
    accuracy_axis(axes, values, scale)
    (bottom, top), marks = axes.get_ylim(), {}
    for place, (name, value) in enumerate(shown.items()):
        colour = MUTED if name == REFERENCE else SERIES[0]
        axes.plot([place], [value], "o", color=colour, markersize=7, gid=f"phase{place}")
        # Above the reference's line if there is room, else below, so that the line does not cross the number.
        is_below = (start == 1 and value < values[0]) or top - value < ROOM * (top - bottom)
        offset, side = (-8, "top") if is_below else (8, "bottom")
        axes.annotate(
            scale.number(value), (place, value), (0, offset), textcoords="offset points", ha="center", va=side
        )
        marks[f"phase{place}"] = Mark(f"{name}\n{scale.number(value)}{scale.unit} {scale.label}")
    axes.set_xticks(range(len(names)), [legible(name, 20) for name in names])
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.grid(False, axis="x")
    words = ", ".join(f"{name} {scale.number(value)}{scale.unit}" for name, value in shown.items())
    return Drawing("accuracy", f"{scale.subject} after each phase", f"{scale.heading}: {words}.", figure, marks)


def _training(run: Run) -> list[Drawing]:
    found = [("pretrain", run.reference_metrics), *((phase, run.metrics) for phase in list(NETWORK_PHASES)[1:])]
    return [drawing for phase, metrics in found if (drawing := _curve(phase, metrics)) is not None]


def last_attempt(phase: str, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recorded steps of a phase since its last start; it includes steps before and after an interruption."""
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for record in metrics:
        if record.get("phase") != phase:
            continue
        if record.get("event") == "start" and record.get("seconds_before", 0.0) < 0.1:
            steps.clear()
        elif "loss" in record and "step" in record:
            steps[record.get("block", ""), record["step"]] = record
    return list(steps.values())


def _curve(phase: str, metrics: list[dict[str, Any]]) -> Drawing | None:
    from matplotlib.ticker import MaxNLocator

    records = last_attempt(phase, metrics)
    if not records:
        return None
    blocks = list(dict.fromkeys(record.get("block", "") for record in records))
    figure, grid = canvas(4.6, 2.9, left=0.75)
    axes = grid[0, 0]
    offset, marks = 0, {}
    for number, block in enumerate(blocks):
        own = [record for record in records if record.get("block", "") == block]
        steps = [offset + record["step"] for record in own]
        losses = [max(record["loss"], 1e-12) for record in own]
        gid = f"block{number}"
        axes.plot(steps, losses, color=SERIES[number % 2], linewidth=1.3, marker="o", markersize=2, gid=gid)
        of_block = f"block {number + 1} of {len(blocks)}: {block}\n" if block else ""
        marks[gid] = Mark(f"{of_block}loss {losses[0]:.4g} → {losses[-1]:.4g}\n{own[-1]['step']} steps")
        offset = steps[-1]
        if number + 1 < len(blocks) and len(blocks) <= NAMED:
            axes.axvline(offset, color=GRID, linewidth=0.8)
    axes.set_yscale("log")
    plain_log_axis(axes.yaxis)
    axes.grid(False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step" if len(blocks) == 1 else f"step, {len(blocks)} blocks one after the other")
    axes.set_ylabel("loss")
    first, last = records[0]["loss"], records[-1]["loss"]
    text = f"Training loss over {offset} steps, from {first:.4g} to {last:.4g}"
    text += f", in {len(blocks)} blocks." if len(blocks) > 1 else "."
    title = {"pretrain": "Training of the reference", "distill": "Distillation", "finetune": "Finetuning"}[phase]
    return Drawing(f"loss-{phase}", title, text, figure, marks)


def _layers(plan: Plan) -> Drawing:
    layers = plan.layers
    errors = [layer.output_error for layer in layers]
    has_errors = any(error is not None for error in errors)
    named = len(layers) <= NAMED
    # Rotated names take about a fifteenth of an inch a letter.
    labels = [legible(layer.name) for layer in layers]
    below = 0.2 + max(map(len, labels)) / 15 if named else 0.5
    figure, axes = canvas(
        11.0,
        (3.6 if has_errors else 2.4) + below,
        2 if has_errors else 1,
        bottom=below,
        sharex=True,
        gridspec_kw={"height_ratios": [3, 2]} if has_errors else None,
    )
    top = axes[0, 0]
    edges = [place - 0.5 for place in range(len(layers) + 1)]
    unit = "bytes" if plan.counts_bytes else "parameters"
    top.stairs([layer.dense_size(unit) for layer in layers], edges, fill=True, color=SOFT, label="before")
    top.stairs([layer.size(unit) for layer in layers], edges, fill=True, color=SERIES[0], label="after")
    top.set_ylabel(unit)
    top.yaxis.set_major_formatter(_thousands() if unit == "parameters" else _of_bytes())
    top.margins(y=0.2)  # room for the legend, also above the first layer
    top.legend(loc="upper left", ncols=2)
    top.set_xlim(-0.5, len(layers) - 0.5)
    if has_errors:
        lower = axes[1, 0]
        places = [place for place, error in enumerate(errors) if error is not None]
        known = [error for error in errors if error is not None]
        lower.vlines(places, 0, known, color=SERIES[1], linewidth=1)
        lower.plot(places, known, "o", color=SERIES[1], markersize=4 if named else 2)
        lower.set_ylim(0)
        lower.set_ylabel("output error")
    last = axes[-1, 0]
    if named:
        last.set_xticks(range(len(layers)), labels, rotation=90, fontsize=8)
    else:
        last.set_xlabel("layer, in the order of the network")
    for each in axes.flat:
        each.grid(False, axis="x")
    largest = max(layers, key=lambda layer: layer.dense_params)
    text = (
        f"{unit.capitalize()} of {len(layers)} layers before and after, with the relative error of each layer's "
        f"output. The largest, {largest.name}, goes from {largest.dense_size(unit):,} to {largest.size(unit):,}."
    )
    return Drawing("layers", f"Where the {unit} went", text, figure)


def _of_bytes() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: readable_bytes(value) if value else "0")


def _thousands() -> Any:
    from matplotlib.ticker import FuncFormatter

    def brief(value: float, _: Any) -> str:
        for unit, size in (("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:g} {unit}"
        return f"{value:g}"

    return FuncFormatter(brief)


def thinned(count: int, most: int = POINTS) -> list[int]:
    """Positions of at most `most` of `count` values, denser at the beginning, where a spectrum falls."""
    if count <= most:
        return list(range(count))
    ratio = count ** (1 / (most - 1))
    return sorted({min(count - 1, max(place, round(ratio**place) - 1)) for place in range(most)})


def kept(spectrum: dict[str, Any]) -> int:
    """How many singular values the rank can keep; in files of earlier versions as many as the rank says."""
    return spectrum.get("kept", spectrum["rank"])


def _spectra(run: Run) -> Drawing:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for spectrum in run.spectra:
        grouped.setdefault(spectrum["layer"], []).append(spectrum)
    sizes = {} if run.plan is None else {layer.name: layer.dense_params for layer in run.plan.layers}
    largest = set(sorted(grouped, key=lambda name: -sizes.get(name, 0))[:SPECTRA])
    shown = [name for name in grouped if name in largest]
    columns = min(COLUMNS, max(3, len(shown)))
    rows = -(-len(shown) // columns)
    width, height = 1.75 * columns, 1.55 * rows + 0.35
    figure, axes = canvas(
        width, height, rows, columns, left=0.45, right=0.05, bottom=0.25, top=0.4, gaps=(0.16, 0.62), sharey=True
    )
    for place in axes.flat[len(shown) :]:
        place.set_visible(False)
    for place, name in zip(axes.flat, shown, strict=False):
        own = grouped[name]
        for number, spectrum in enumerate(own):
            chosen = thinned(len(spectrum["values"]))
            values = [max(spectrum["values"][i], 1e-4) for i in chosen]
            colour = SERIES[number % len(SERIES)]
            place.plot([i + 1 for i in chosen], values, color=colour, linewidth=1.1)
            place.axvline(kept(spectrum), color=colour, linestyle="--", linewidth=0.8)
        place.set_yscale("log")
        place.set_ylim(0.8e-3 if min(s["values"][-1] for s in run.spectra) > 1e-3 else 0.8e-4, 1.3)
        plain_log_axis(place.yaxis, each=(1.0,))
        ranks = f"{own[0]['method']} {', '.join(str(s['rank']) for s in own)}"
        place.set_title(f"{legible(name, 30)}\n{legible(ranks, 40)}", fontsize=7.5, pad=3)
        place.tick_params(labelsize=7)
    which = f"The {len(shown)} largest of {len(grouped)} layers" if len(shown) < len(grouped) else "All layers"
    text = (
        f"{which}: singular values, relative to the largest, over their number, on a logarithmic axis; "
        "a dashed line marks how many the rank can keep. Methods with several ranks have a curve for each."
    )
    return Drawing("spectra", "Spectra and the ranks chosen", text, figure)
