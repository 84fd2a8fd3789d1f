"""The figures of many runs: accuracy against parameters and time, with the Pareto front, for each method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tspc.pages.drawing import (
    GLYPHS,
    INK,
    LEGEND,
    MARKERS,
    MUTED,
    SERIES,
    Drawing,
    Key,
    Mark,
    accuracy_axis,
    canvas,
    legible,
    plain_log_axis,
)
from tspc.pages.rows import Row

COSTS: dict[str, tuple[str, str, Callable[[Row], float | None]]] = {
    "rate": ("Accuracy against rate", "parameters left, as a share", lambda row: row.reached),
    "latency": ("Accuracy against latency", "latency in ms", lambda row: row.latency),
    "macs": ("Accuracy against operations", "multiply-accumulates of an input", lambda row: row.macs),
}
"""Each figure's title, the label of its horizontal axis, and the function that gives its value."""


def sweep_drawings(rows: list[Row], prefix: str = "") -> list[Drawing]:
    """The figures for which the runs have data; `prefix` makes their names unique for each group of runs."""
    order = list(dict.fromkeys(row.series for row in rows))
    drawings = []
    for name, (title, label, cost) in COSTS.items():
        shown = [(cost(row), row) for row in rows if row.final is not None]
        known = [(value, row) for value, row in shown if value is not None]
        if known:
            drawings.append(_scatter(f"{prefix}{name}", title, label, known, order))
    return drawings


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """The indices of the points (cost, gain) that no other point beats in both, in order of rising cost."""
    best, front = float("-inf"), []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            front.append(place)
    return front


def _scatter(name: str, title: str, label: str, known: list[tuple[float, Row]], order: list[str]) -> Drawing:
    figure, grid = canvas(8.6, 4.6, right=1.55)
    axes = grid[0, 0]
    points = [(cost, 100 * row.final) for cost, row in known if row.final is not None]
    # By the rate asked for: of two runs at it, the worse one is not better for having left a rank unused.
    by_rate = COSTS["rate"][0] == title
    front = pareto([(row.rate if by_rate and row.rate else cost, 100 * (row.final or 0)) for cost, row in known])
    edge = list(zip(*(points[i] for i in front), strict=True))
    axes.step(*edge, where="post", color=MUTED, linewidth=6, alpha=0.25, label="Pareto front")
    marks: dict[str, Mark] = {}
    for number, series in enumerate(order):
        own = [i for i, (_, row) in enumerate(known) if row.series == series]
        if own:
            _series(axes, number, series, own, points, known, marks, front)
    references = {round(100 * row.reference, 6) for _, row in known if row.reference is not None}
    for reference in references:
        axes.axhline(reference, color=INK, linestyle="--", linewidth=1, label="reference")
    accuracy_axis(axes, [accuracy for _, accuracy in points] + list(references))
    axes.set_xscale("log")
    plain_log_axis(axes.xaxis)
    asked = sorted({row.rate for _, row in known if row.rate is not None})
    if "parameters" in label and asked:
        axes.set_xticks(asked, [f"{rate:g}" for rate in asked])
    axes.set_xlabel(label)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    legend = axes.legend(
        handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0
    )
    legend.set_gid(LEGEND)
    best = ", ".join(f"{known[i][1].label} {points[i][1]:.2f} %" for i in front)
    text = f"Top-1 accuracy of {len(points)} runs against {label}. On the Pareto front: {best}."
    return Drawing(name, title, text, figure, marks, tuple(_keys(order, known)))


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a series."""
    return SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]


def _keys(order: list[str], known: list[tuple[float, Row]]) -> Iterator[Key]:
    shown = {row.series for _, row in known}
    for number, series in enumerate(order):
        if series in shown:
            colour, marker = _look(number)
            yield Key.of(series, GLYPHS[marker], colour)
    yield Key.of("Pareto front", "▬", MUTED)
    if any(row.reference is not None for _, row in known):
        yield Key.of("reference", "╌", INK)


def _series(
    axes: Any,
    number: int,
    series: str,
    own: list[int],
    points: list[tuple[float, float]],
    known: list[tuple[float, Row]],
    marks: dict[str, Mark],
    front: list[int],
) -> None:
    """A method's runs as marks, and a line through the means of those with the same goal."""
    colour, marker = _look(number)
    goals: dict[str, list[tuple[float, float]]] = {}
    for i in own:
        goals.setdefault(known[i][1].goal, []).append(points[i])
    means = sorted((sum(x for x, _ in at) / len(at), sum(y for _, y in at) / len(at)) for at in goals.values())
    axes.plot(*zip(*means, strict=True), color=colour, linewidth=1.2, alpha=0.8)
    axes.plot([], [], color=colour, marker=marker, markersize=6, linewidth=1.2, label=legible(series, 30))
    for i in own:
        row, is_best = known[i][1], i in front
        axes.plot(
            *([value] for value in points[i]),
            marker,
            color=colour,
            markersize=9 if is_best else 6,
            markeredgecolor=INK if is_best else colour,
            markerfacecolor=colour if row.status == "done" else "none",
            gid=f"run{i}",
        )
        marks[f"run{i}"] = Mark(row.tip + ("\non the Pareto front" if is_best else ""), row.link)
