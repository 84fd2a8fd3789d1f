"""`report.html`: one run on one page that opens from disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tspc.compression.beside_rows import lines
from tspc.compression.goals import bits_of
from tspc.errors import RunError
from tspc.pages.benchmark import LATENCY, MACS, figures_of, readable_bytes, readable_count
from tspc.pages.drawing import style
from tspc.pages.goals import asked_of, readable_goal
from tspc.pages.records import REFERENCE, Run, read_run
from tspc.pages.render import render
from tspc.pages.run_figures import kept, run_drawings, thinned
from tspc.quantization.grids import FULL
from tspc.store.files import make_folder, write_text
from tspc.store.records import FIGURES
from tspc.store.scores import scale_in, shown, top5_in, value_in

_SPARK = (120, 26)
"""Width and height of a spectrum's curve in the table of layers."""


def write_report(directory: Path) -> Path:
    """Makes `report.html` and `figures/` from the files of a finished run; returns the page's path.

    Raises RunError if there is no finished run, or the files are damaged or cannot be written.
    """
    run = read_run(directory)
    if run is None or run.result is None:
        raise RunError(f"{directory} holds no finished run to report on")
    make_folder(directory / FIGURES)
    with style():
        figures = {}
        for drawing in run_drawings(run):
            figures[drawing.name] = drawing.put(directory / FIGURES)
    page = render("report.html", run=run, figures=figures, folder=FIGURES, **_content(run))
    path = directory / "report.html"
    write_text(path, page)
    return path


def _content(run: Run) -> dict[str, Any]:
    assert run.result is not None
    return {
        "title": f"{run.network} on {run.dataset}: {asked_of(run.method, run.goal, run.bits)}",
        "sentence": sentence(run.result, run.inputs),
        "metric": run.scale,
        "contract": (run.result.get("contract") or {"goals": []})["goals"],
        "cards": _cards(run),
        "phases": _phases(run.result),
        "asked": _asked(run),
        "files": _files(run.result),
        "layers": _layers(run),
        "beside": [] if run.plan is None else lines(run.plan.beside),
        "in_bytes": run.plan is not None and run.plan.counts_bytes,
        "settings": _settings(run),
        "problems": run.problems,
    }


def sentence(result: dict[str, Any], inputs: str) -> str:
    """The gain in size and the loss of accuracy, in one sentence; `inputs` says what the network takes."""
    unit = "parameters" if bits_of(result) == str(FULL) else "bytes"
    before, after = result[unit]["before"], result[unit]["after"]
    size = f"{result['network']} became {_times(before, after)} smaller: {after:,} of {before:,} {unit} are left"
    reference, final = result["reference"]["accuracy"], result["accuracy"]
    if reference is None or final is None:
        return f"{size}. Its accuracy was not measured."
    scale, values = scale_in(final), f"{shown(reference)} → {shown(final)}"
    change = scale.change(value_in(reference), value_in(final))
    if not scale.is_share:
        verdict = "better" if scale.gain(change) > 0 else "worse" if change else "the same"
        return f"{size}. {scale.heading}: {values}, which is {verdict}."
    verb = "keeps its" if abs(change) < 0.005 else f"gains {change:.2f} points of" if change > 0 else ""
    verb = verb or f"loses {-change:.2f} points of"
    text = f"{size}, and it {verb} {scale.title} ({values})."
    noise = 100 * math.hypot(_deviation(reference), _deviation(final)) if scale.is_proportion else 0.0
    if 0 < abs(change) < noise:
        text += f" Over {final['images']:,} test {inputs}, a change so small is within chance."
    return text


def _asked(run: Run) -> str:
    """What the user asked for, what was reached, and of what."""
    assert run.result is not None
    result, unit = run.result, run.result.get("rate_unit", "parameters")
    reached, is_whole = f"{result['rate_reached']:.4f}", result["rate_scope"] == "network"
    if unit == "parameters":
        scope = "all parameters" if is_whole else "the layers that share the budget"
        text = f"Rate asked {result['rate']:.4g}, reached {reached} of {scope}"
    else:
        scope = "the network" if is_whole else "the layers that share the budget"
        text = f"Asked: {readable_goal(run.goal)}. Reached: {reached} of the bytes of {scope}"
    return f"{text}; {result['allocation']} allocation."


def _times(before: float, after: float) -> str:
    return f"{before / after:.1f} times" if after else "infinitely"


def _deviation(accuracy: dict[str, Any]) -> float:
    """The standard error of a share of right answers, from the number of inputs."""
    share = value_in(accuracy)
    return math.sqrt(share * (1 - share) / accuracy["images"])


def _cards(run: Run) -> list[dict[str, str]]:
    """The reference against the compressed network, for the first screen."""
    assert run.result is not None
    result, cards = run.result, []
    reference, final = result["reference"]["accuracy"], result["accuracy"]
    name = run.scale.heading
    if reference and final:
        cards.append(_card(name, shown(reference), shown(final), _note(reference, final, run.inputs)))
    else:
        cards.append({"name": name, "missing": "not measured: no data was given"})
    sizes = result["parameters"]
    cards.append(_smaller("Parameters", sizes["before"], sizes["after"], readable_count))
    cards.append(_smaller("Bytes of weights", result["bytes"]["before"], result["bytes"]["after"], readable_bytes))
    measured = {figure.name: figure for figure in figures_of(run.benchmark)}
    for name in (MACS, LATENCY):
        if name in measured:
            found = measured[name]
            cards.append(_smaller(name, found.before, found.after, found.format, found.where))
        else:
            cards.append({"name": name, "missing": "not measured: phase=benchmark"})
    return cards


def _note(reference: dict[str, Any], final: dict[str, Any], inputs: str) -> str:
    """The change in points, and how much of it may be chance."""
    scale, count = scale_in(final), f"{final['images']:,} {inputs}"
    change = _change(reference, final)
    if scale.is_proportion:
        return f"{change} points; ± {100 * _deviation(final):.2f} for {count}"
    return f"{change}{' points' if scale.is_share else ''} for {count}"


def _card(name: str, before: str, after: str, note: str) -> dict[str, str]:
    return {"name": name, "before": before, "after": after, "note": note}


def _smaller(name: str, before: float, after: float, form: Any, where: str = "") -> dict[str, str]:
    """`where` a measurement holds."""
    better, worse = ("faster", "slower") if name == LATENCY else ("smaller", "larger")
    note = f"{before / after:.2f}× {better}" if 0 < after <= before else f"{after / max(before, 1e-9):.2f}× {worse}"
    return _card(name, form(before), form(after), f"{note}; {where}" if where else note)


def _phases(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of phases; a measurement without `top5` or `seconds` has none."""
    rows = []
    for name, entry in ({REFERENCE: result["reference"]} | result["phases"]).items():
        accuracy, seconds = entry["accuracy"], entry.get("seconds")
        row = {"name": name, "accuracy": accuracy, "seconds": seconds, "has_five": top5_in(accuracy) is not None}
        rows.append(row)
    return rows


def _files(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of exported files, the network first; empty if there are none, or none was measured."""
    found: dict[str, Any] = result.get("export") or {"files": []}
    own = found.get("accuracy")
    if not any(file.get("runtime") for file in found["files"]):
        return []
    network = {"file": "the network", "precision": "", "runtime": "PyTorch", "bytes": result["bytes"]["after"]}
    rows = [network | {"accuracy": own, "change": ""}]
    for file in found["files"]:
        accuracy = file.get("accuracy")
        change = _change(own, accuracy) if accuracy and own else ""
        name, runtime = file["file"], file.get("runtime") or "a network that loads it"
        row = {"file": name, "precision": file.get("precision", ""), "runtime": runtime, "bytes": file["bytes"]}
        rows.append(row | {"accuracy": accuracy, "change": change})
    return rows


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    scale = scale_in(after)
    return scale.signed(scale.change(value_in(before), value_in(after)))


def _layers(run: Run) -> list[dict[str, Any]]:
    """Rows of the table of layers, with the widths of their bars and their spectra as curves."""
    if run.plan is None:
        return []
    curves: dict[str, list[dict[str, Any]]] = {}
    for spectrum in run.spectra:
        curves.setdefault(spectrum["layer"], []).append(spectrum)
    unit = "bytes" if run.plan.counts_bytes else "parameters"
    largest = max(layer.dense_size(unit) for layer in run.plan.layers)
    worst = max((layer.output_error or 0.0 for layer in run.plan.layers), default=0.0) or 1.0
    return [
        {
            "layer": layer,
            "path": layer.path if layer.rank else None,
            "sizes": (layer.dense_size(unit), layer.size(unit)),
            "share": layer.size(unit) / max(1, layer.dense_size(unit)),  # a shared kernel is counted in another row
            "before": 100 * layer.dense_size(unit) / largest,
            "after": 100 * layer.size(unit) / largest,
            "error": 100 * (layer.output_error or 0.0) / worst,
            "sparks": [_spark(spectrum) for spectrum in curves.get(layer.name, [])],
        }
        for layer in run.plan.layers
    ]


def _spark(spectrum: dict[str, Any]) -> dict[str, Any]:
    """A spectrum as an SVG path, over a logarithmic axis of three decades, and where the values that are kept end."""
    values, (width, height) = spectrum["values"], _SPARK
    last = max(1, len(values) - 1)
    points = []
    for place in thinned(len(values), 40):
        depth = min(1.0, -math.log10(max(values[place], 1e-3)) / 3)
        points.append(f"{round(place / last * width)} {round(1 + depth * (height - 2))}")
    return {"d": Markup("M" + "L".join(points)), "x": round((kept(spectrum) - 1) / last * width)}


def _settings(run: Run) -> dict[str, Any]:
    """Everything that is needed to make the run again."""
    assert run.result is not None
    data = next((info["data"] for info in run.phases.values() if info.get("data")), None)
    return {
        "command": run.result.get("command"),
        "versions": run.result["versions"],
        "device": run.result["device"],
        "seed": run.result["seed"],
        "data": data,
        "identity": run.identity,
        "phases": {name: info["settings"] for name, info in run.phases.items()},
        "all": run.result.get("settings"),
    }
