"""The runs of a comparison as rows of one table, and that table as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tspc.decompositions import Dense
from tspc.pages.benchmark import LATENCY, MACS, figures_of
from tspc.pages.goals import order_of_goal, readable_goal
from tspc.pages.records import Broken, Run
from tspc.phases.table import NETWORK_PHASES
from tspc.store.records import flattened
from tspc.store.scores import SCALES, TOP1, Scale, value_in

DECISIVE = (*(f"phase.{name}." for name in NETWORK_PHASES), "calibration.", "allocation", "eval_samples")
"""What the keys of settings begin with that an accuracy depends on, besides method, rate and seed."""

_FORMULA = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}", "\N{FULLWIDTH HYPHEN-MINUS}")
"""The first characters of a cell that a spreadsheet takes for a formula."""
_MARKDOWN = {ord(c): f"\\{c}" for c in "\\`*|[]$<>"} | dict.fromkeys(map(ord, "\r\n"), " ")
_LATEX = {ord(c): f"\\{c}" for c in "&%$#_{}"} | {
    ord("\\"): r"\textbackslash{}",
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
    **dict.fromkeys(map(ord, "\r\n"), " "),
}


@dataclass(frozen=True)
class Row:
    """One run.

    Accuracies are values of the metric with this `scale`. `judged` is the number of test inputs for each phase, which
    `inputs` names, and `latency` is in ms.

    `bits` is the width that was asked for. With `is_whole` nothing is decomposed: the run shows what rounding alone
    gives. `unit` says what the rate counts, parameters or bytes; `reached` is the rate reached, and `left` the share of
    parameters that is left. `before` has the reference's bytes, MACs and latency. Unknown values are None. `settings`
    holds the settings that affect the accuracy, by their dotted keys.
    """

    label: str
    group: tuple[str, str]
    series: str
    goal: str
    status: str
    seed: int | None = None
    error: str | None = None
    link: str | None = None
    bits: str = "32"
    is_whole: bool = False
    unit: str = "parameters"
    reached: float | None = None
    left: float | None = None
    reference: float | None = None
    phases: dict[str, float | None] = field(default_factory=dict)
    final: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    macs: float | None = None
    latency: float | None = None
    before: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    judged: dict[str, int] = field(default_factory=dict)
    inputs: str = "images"
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    scale: Scale = SCALES[TOP1]

    @property
    def rate(self) -> float | None:
        """The rate of parameters that the user gave; None if the goal was another one."""
        try:
            return float(self.goal) if self.unit == "parameters" else None
        except ValueError:
            return None

    @property
    def has_few_bits(self) -> bool:
        """Whether entries of the factors may have fewer than 32 bits."""
        return self.bits != "32"

    @property
    def change(self) -> float | None:
        """The change against the reference, in points."""
        return None if self.final is None or self.reference is None else self.scale.change(self.reference, self.final)

    @property
    def tip(self) -> str:
        lines = [f"{self.label}, seed {self.seed}", f"{self.scale.text(self.final or 0.0)} {self.scale.label}"]
        if self.change is not None:
            lines[-1] += f" ({self.scale.signed(self.change)})"
        if self.reached is not None and self.parameters is not None:
            lines.append(f"rate {self.reached:.4f}, {self.parameters:,} parameters")
        if self.bytes is not None and self.has_few_bits:
            lines[-1] = f"{self.bytes:,} bytes, {self.parameters:,} parameters"
        if self.latency is not None:
            lines.append(f"{self.latency:.3g} ms")
        return "\n".join(lines)


def row_of(run: Run, page: Path) -> Row:
    """The row of a run; `page` is the folder of the page, for the link to the run's report."""
    label = run.path.parent.name
    common: dict[str, Any] = {
        "label": label,
        "group": (run.dataset, run.network),
        "series": run.series,
        "goal": run.goal,
        "status": run.status,
        "bits": run.bits,
        "is_whole": run.method == Dense.name,
        "seed": run.identity.get("seed"),
        "error": run.error,
        "scale": run.scale,
        "inputs": run.inputs,
    }
    result = run.result
    if result is None:
        done = {name: _value(info["accuracy"]) for name, info in run.phases.items()}
        return Row(**common, phases=done)
    report, unit = run.path / "report.html", result.get("rate_unit", "parameters")
    figures = {figure.name: figure for figure in figures_of(run.benchmark)}
    measured = {name: figure.after for name, figure in figures.items()}
    return Row(
        **common,
        link=quote(Path(os.path.relpath(report, page)).as_posix()) if report.exists() else None,
        unit=unit,
        reached=result["rate_reached"],
        left=result["rate_reached"] if unit == "parameters" else _left(result["parameters"]),
        reference=_value(result["reference"]["accuracy"]),
        phases={name: _value(phase["accuracy"]) for name, phase in result["phases"].items()},
        judged={name: p["accuracy"]["images"] for name, p in result["phases"].items() if p["accuracy"]},
        final=_value(result["accuracy"]),
        parameters=result["parameters"]["after"],
        bytes=result["bytes"]["after"],
        macs=measured.get(MACS),
        latency=measured.get(LATENCY),
        before={"bytes": result["bytes"]["before"]} | {name: figure.before for name, figure in figures.items()},
        seconds=sum(phase["seconds"] for phase in result["phases"].values()),
        settings={k: v for k, v in flattened(result.get("settings", {})).items() if k.startswith(DECISIVE)},
    )


def _left(parameters: dict[str, int]) -> float:
    """The share of the parameters that is left of the layers that share the budget, or of the whole network."""
    prefix = "tensorized_" if parameters.get("tensorized_before") else ""
    return parameters[f"{prefix}after"] / parameters[f"{prefix}before"]


def row_of_broken(broken: Broken) -> Row:
    return Row(broken.label, ("", ""), broken.method, broken.goal, broken.status, error=broken.error)


def differences_of(rows: list[Row]) -> dict[str, list[str]]:
    """The settings in which finished runs differ, with their values."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.settings.items():
            found.setdefault(key, set()).add(str(value))
    return {key: sorted(values) for key, values in found.items() if len(values) > 1}


def judged_by(rows: list[Row]) -> dict[int, list[str]]:
    """The phases by the number of test inputs that judged them; empty if the number is the same for all."""
    found: dict[int, list[str]] = {}
    for phase in NETWORK_PHASES:
        for count in sorted({row.judged[phase] for row in rows if phase in row.judged}):
            found.setdefault(count, []).append(phase)
    return found if len(found) > 1 else {}


def _value(accuracy: dict[str, Any] | None) -> float | None:
    return None if accuracy is None else value_in(accuracy)


def csv_of(rows: list[Row]) -> str:
    """Every run with every number, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    is_named = any(row.scale.name != TOP1 for row in rows)
    head = "run dataset network method goal bits seed status rate_reached".split()
    head += ["metric", "reference"] if is_named else ["reference"]
    writer.writerow([*head, *NETWORK_PHASES, "final", "parameters", "bytes", "macs", "latency_ms", "seconds", "error"])
    for row in rows:
        known = [row.label, *row.group, row.series, row.goal, row.bits if any(row.group) else ""]
        known += [row.seed, row.status, row.reached, *([row.scale.name] if is_named else []), row.reference]
        known += [row.phases.get(phase) for phase in NETWORK_PHASES]
        known += [row.final, row.parameters, row.bytes, row.macs, row.latency, row.seconds, row.error]
        writer.writerow([_cell(value) for value in known])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Text that no spreadsheet takes for a formula: if it begins like one, an apostrophe is put before it."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = "".join(c if c.isprintable() else " " for c in value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text[:1] != value[:1] else text


@dataclass(frozen=True)
class Grid:
    """Methods × rates, as papers print it: mean accuracy in points, and its deviation if there are several seeds."""

    title: str
    goals: list[str]
    methods: list[str]
    cells: dict[tuple[str, str], tuple[float, float | None]]
    reference: float | None
    scale: Scale = SCALES[TOP1]

    def text(self, method: str, goal: str) -> str:
        cell = self.cells.get((method, goal))
        if cell is None:
            return ""
        mean, deviation = cell
        number = self.scale.number
        return number(mean) if deviation is None else f"{number(mean)} ± {number(deviation)}"

    def is_best(self, method: str, goal: str) -> bool:
        """Whether no method is better at this rate, as printed."""
        printed = {
            method: float(self.scale.number(mean)) for (method, at), (mean, _) in self.cells.items() if at == goal
        }
        return method in printed and printed[method] == max(printed.values(), key=self.scale.gain)


def grid_of(rows: list[Row], phase: str | None = None) -> Grid | None:
    """The accuracy of every method at every rate, after `phase` or at the end; None if no accuracy is known.

    All rows have the same metric.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = row.final if phase is None else row.phases.get(phase)
        if value is not None:
            values.setdefault((row.series, row.goal), []).append(row.scale.points(value))
    if not values:
        return None
    cells = {
        key: (statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None)
        for key, found in values.items()
    }
    goals = sorted({goal for _, goal in cells}, key=order_of_goal)
    references = [row.reference for row in rows if row.reference is not None]
    scale = rows[0].scale
    title = "at the end" if phase is None else f"after {phase}, before any training"
    return Grid(
        f"{scale.heading}{' in %' if scale.is_share else ''}, {title}",
        goals,
        list(dict.fromkeys(method for method, _ in cells)),
        cells,
        scale.points(references[0]) if references else None,
        scale,
    )


def markdown_of(grid: Grid) -> str:
    lines = [
        f"{grid.title}{_reference_note(grid)}:",
        "",
        "| method | " + " | ".join(map(readable_goal, grid.goals)) + " |",
    ]
    lines.append("|---|" + "---:|" * len(grid.goals))
    for method in grid.methods:
        cells = [
            f"**{grid.text(method, goal)}**" if grid.is_best(method, goal) else grid.text(method, goal)
            for goal in grid.goals
        ]
        lines.append(f"| {method.translate(_MARKDOWN)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def latex_of(grid: Grid) -> str:
    """A table for booktabs."""
    lines = [f"% {grid.title}{_reference_note(grid)}", rf"\begin{{tabular}}{{l{'r' * len(grid.goals)}}}", r"\toprule"]
    lines += ["method & " + " & ".join(map(readable_goal, grid.goals)) + r" \\", r"\midrule"]
    for method in grid.methods:
        cells = []
        for goal in grid.goals:
            text = grid.text(method, goal).replace("±", r"$\pm$")
            cells.append(rf"\textbf{{{text}}}" if grid.is_best(method, goal) else text)
        lines.append(f"{method.translate(_LATEX)} & " + " & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _reference_note(grid: Grid) -> str:
    return "" if grid.reference is None else f" (reference {grid.scale.number(grid.reference)})"
