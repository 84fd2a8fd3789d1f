"""`sweep.html`: many runs on one page, with their tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from tspc.decompositions import NAMES
from tspc.errors import TspcError
from tspc.files import write_atomically
from tspc.pages.drawing import style
from tspc.pages.records import DONE, FailedJob, Run, find_runs, fixed_part, read_sweep
from tspc.pages.render import render
from tspc.pages.report import FIGURES, write_report
from tspc.pages.rows import Row, csv_of, grid_of, latex_of, markdown_of, order_of_goal, row_of, row_of_failed
from tspc.pages.sweep_figures import sweep_drawings
from tspc.runs import STAGES


def write_comparison(pattern: str) -> Path:
    """A page of all runs below what a wildcard matches, in the folder that it starts from; returns the page's path.

    Raises RunError if there are none, or the page cannot be written.
    """
    runs, failed = find_runs(pattern)
    folder = fixed_part(pattern)
    if (folder / "run.json").exists():  # of one run; the page is about several
        folder = folder.parent
    return _write(folder, f"Runs of {pattern}", runs, failed)


def write_sweep(folder: Path) -> Path:
    """A page of the sweep whose records `folder` holds, into it; returns the page's path."""
    runs, failed = read_sweep(folder)
    return _write(folder, "Sweep", runs, failed)


def _write(folder: Path, title: str, runs: list[Run], failed: list[FailedJob]) -> Path:
    for run in runs:
        _renew_report(run)
    order = {name: place for place, name in enumerate(NAMES)}
    runs.sort(key=lambda r: (r.dataset, r.network, order[r.method], r.series, order_of_goal(r.goal), r.path.name))
    rows = [*(row_of(run, folder) for run in runs), *map(row_of_failed, failed)]
    figures = folder / FIGURES
    figures.mkdir(exist_ok=True)
    groups = _groups(rows)
    with style():
        content = [_group(name, own, figures, f"g{i}-" if i else "") for i, (name, own) in enumerate(groups.items())]
    files = {
        "sweep.csv": csv_of(rows),
        "sweep.md": "\n".join(markdown_of(grid) for group in content for grid in group["grids"]),
        "sweep.tex": "\n".join(latex_of(grid) for group in content for grid in group["grids"]),
    }
    stages = [stage for stage in STAGES if any(stage in row.phases for row in rows)]
    page = render(
        "sweep.html",
        title=title,
        rows=rows,
        groups=content,
        counts=_counts(rows),
        folder=FIGURES,
        files={name: text for name, text in files.items() if text},
        runs=[row for row in rows if any(row.group)],
        stages=stages,
        stage_columns=[(stage, "number") for stage in stages],
    )
    for name, text in (files | {"sweep.html": page}).items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return folder / "sweep.html"


def _renew_report(run: Run) -> None:
    """Makes the run's own report where there is none, or one older than its results."""
    report = run.path / "report.html"
    sources = [path for path in (run.path / "result.json", run.path / "benchmark.json") if path.exists()]
    if run.status != DONE:
        return
    if report.exists() and report.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
        return
    with suppress(TspcError, OSError):  # somebody else's folder: no link then
        write_report(run.path)


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The runs by data set and network, for only those compare."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if any(row.group):
            groups.setdefault(row.group, []).append(row)
    return groups


def _group(name: tuple[str, str], rows: list[Row], folder: Path, prefix: str) -> dict[str, Any]:
    figures = {}
    for drawing in sweep_drawings(rows, prefix):
        svg = drawing.save(folder)
        figures[drawing.name] = {"title": drawing.title, "text": drawing.text, "svg": drawing.inline(svg)}
    trained = any(set(row.phases) - {"decompose"} for row in rows)
    grids = [grid_of(rows), grid_of(rows, "decompose") if trained else None]
    return {
        "name": f"{name[1]} on {name[0]}",
        "figures": figures,
        "grids": [grid for grid in grids if grid is not None],
        "has_latency": any(row.latency is not None for row in rows),
        "has_rate": any(row.final is not None for row in rows),
    }


def _counts(rows: list[Row]) -> str:
    """How many runs, and how many of them are done, still going, stopped or failed."""
    statuses = [row.status for row in rows]
    parts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    return f"{len(rows)} run{'s' if len(rows) != 1 else ''}: {', '.join(parts)}"
