"""`sweep.html`: many runs on one page, with their tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from tspc.decompositions import names
from tspc.pages.drawing import style
from tspc.pages.goals import order_of_goal, readable_goal
from tspc.pages.records import DAMAGED, DAMAGES, DONE, Broken, Run, damaged, find_runs, read_sweep, split_pattern
from tspc.pages.render import render
from tspc.pages.report import write_report
from tspc.pages.rows import (
    Row,
    csv_of,
    differences_of,
    grid_of,
    judged_by,
    latex_of,
    markdown_of,
    row_of,
    row_of_broken,
)
from tspc.pages.sweep_figures import sweep_drawings
from tspc.phases.table import NETWORK_PHASES
from tspc.store.files import make_folder, remove_left_over, write_text
from tspc.store.records import FIGURES
from tspc.store.scores import TOP1


def write_comparison(pattern: str) -> Path:
    """A page of all runs below the matches of a wildcard, in the folder where it starts; returns the page's path.

    Raises RunError if there are none, or the page cannot be written.
    """
    found = find_runs(pattern)
    folder, _ = split_pattern(pattern)
    folder = folder if folder.is_dir() else folder.parent
    if (folder / "run.json").exists():  # of one run; the page is about several
        folder = folder.parent
    return _write(folder, f"Runs of {pattern}", found)


def write_sweep(folder: Path) -> Path:
    """A page of a sweep, written into the `folder` that holds its records; returns the page's path."""
    return _write(folder, "Sweep", read_sweep(folder))


def _write(folder: Path, title: str, found: list[Run | Broken]) -> Path:
    figures = folder / FIGURES
    make_folder(figures, "the page stands beside the runs: copy them to a place that can be written")
    remove_left_over(folder, figures)
    rows = _rows(found, folder)
    groups = _groups(rows)
    with style():
        content = [_group(own, figures, f"g{i}-" if i else "") for i, own in enumerate(groups.values())]
    files = {
        "sweep.csv": csv_of(rows),
        "sweep.md": "\n".join(markdown_of(grid) for group in content for grid in group["grids"]),
        "sweep.tex": "\n".join(latex_of(grid) for group in content for grid in group["grids"]),
    }
    phases = [phase for phase in NETWORK_PHASES if any(phase in row.phases for row in rows)]
    page = render(
        "sweep.html",
        title=title,
        rows=rows,
        groups=content,
        counts=_counts(rows),
        folder=FIGURES,
        files={name: text for name, text in files.items() if text},
        runs=[row for row in rows if any(row.group) or row.status == DAMAGED],
        phases=phases,
        readable_goal=readable_goal,
        has_metrics=any(row.scale.name != TOP1 for row in rows),
        has_few_bits=any(row.has_few_bits for row in rows),
        phase_columns=[(phase, "number") for phase in phases],
    )
    for name, text in (files | {"sweep.html": page}).items():
        write_text(folder / name, text)
    return folder / "sweep.html"


def _rows(found: list[Run | Broken], folder: Path) -> list[Row]:
    """One row for each run, in order. Runs that cannot be shown come last; they do not affect the others."""
    order = {name: place for place, name in enumerate(names())}
    last = len(order)  # a method of another version
    placed: list[tuple[Any, Row]] = []
    broken: list[Broken] = []
    for run in found:
        if isinstance(run, Broken):
            broken.append(run)
            continue
        try:
            place = (
                run.dataset,
                run.network,
                order.get(run.method, last),
                run.series,
                order_of_goal(run.goal),
                run.path.name,
            )
            _renew_report(run)
            placed.append((place, row_of(run, folder)))
        except DAMAGES as error:
            broken.append(damaged(run.path, error))
    placed.sort(key=lambda entry: entry[0])
    return [*(row for _, row in placed), *map(row_of_broken, broken)]


def _renew_report(run: Run) -> None:
    """Makes the run's own report if there is none, or if it is older than the result."""
    report, result = run.path / "report.html", run.path / "result.json"
    if run.status != DONE:
        return
    if report.exists() and report.stat().st_mtime >= result.stat().st_mtime:
        return
    with suppress(*DAMAGES):  # somebody else's folder, or a damaged one: no link then
        write_report(run.path)


def _groups(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The runs grouped by data set, network and metric, because only runs of one group can be compared."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if any(row.group):
            groups.setdefault((*row.group, row.scale.name), []).append(row)
    return groups


def _group(rows: list[Row], folder: Path, prefix: str) -> dict[str, Any]:
    figures, (data, network), scale = {}, rows[0].group, rows[0].scale
    for drawing in sweep_drawings(rows, prefix):
        figures[drawing.name] = drawing.put(folder)
    trained = any(set(row.phases) - {"decompose"} for row in rows)
    grids = [grid_of(rows), grid_of(rows, "decompose") if trained else None]
    return {
        "name": f"{network} on {data}" + ("" if scale.name == TOP1 else f", judged by {scale.title}"),
        "subject": scale.subject,
        "figures": figures,
        "grids": [grid for grid in grids if grid is not None],
        "differences": differences_of(rows),
        "judged": judged_by(rows),
        "inputs": rows[0].inputs,
        "has_latency": any(row.latency is not None for row in rows),
        "has_rate": any(row.final is not None for row in rows),
    }


def _counts(rows: list[Row]) -> str:
    """The number of runs, and how many of them are done, running, stopped or failed."""
    statuses = [row.status for row in rows]
    parts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    return f"{len(rows)} run{'s' if len(rows) != 1 else ''}: {', '.join(parts)}"
