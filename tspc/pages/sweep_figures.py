"""The figures of many runs: accuracy against size and time, with the Pareto front, for each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tspc.pages.benchmark import LATENCY, MACS, readable_bytes, readable_count
from tspc.pages.drawing import (
    GLYPHS,
    INK,
    LEGEND,
    MARKERS,
    MUTED,
    SERIES,
    WHOLE,
    Drawing,
    Key,
    Mark,
    accuracy_axis,
    canvas,
    legible,
    plain_log_axis,
)
from tspc.pages.goals import readable_goal
from tspc.pages.rows import Row

NOT_DECOMPOSED = "not decomposed"
"""What the legend calls the reference and the runs that only round it."""

NAME_WIDTH, NAME_HEIGHT = 0.16, 0.045
"""The room of a name in a figure, as shares of its axes."""


@dataclass(frozen=True)
class Cost:
    """What a figure has on its horizontal axis.

    `title` ends that of the figure, as in "Accuracy against rate". `of` gives the value of a run, or None. `key` is the
    reference's value in `Row.before`; None if the figure shows the decomposed networks only. `form` writes a number of
    the axis.
    """

    name: str
    title: str
    label: str
    of: Callable[[Row], float | None]
    key: str | None = None
    form: Callable[[float], str] = "{:g}".format


RATE = Cost("rate", "rate", "parameters left, as a share", lambda row: None if row.is_whole else row.left)
BYTES = Cost("bytes", "bytes", "bytes of the network", lambda row: row.bytes, "bytes", readable_bytes)
SPEED = (
    Cost("latency", "latency", "latency in ms", lambda row: row.latency, LATENCY),
    Cost(
        "macs",
        "operations",
        "multiply-accumulates of an input",
        lambda row: row.macs,
        MACS,
        readable_count,
    ),
)


def sweep_drawings(rows: list[Row], prefix: str = "") -> list[Drawing]:
    """The figures for which the runs have data; `prefix` makes their names unique for each group of runs.

    The first one counts bytes if entries of any run have fewer than 32 bits, else parameters.
    """
    order = list(dict.fromkeys(row.series for row in rows if not row.is_whole))
    sizes = (BYTES, RATE) if any(row.has_few_bits for row in rows) else (RATE, BYTES)
    drawings = []
    for cost in (*sizes, *SPEED):
        shown = [(cost.of(row), row) for row in rows if row.final is not None]
        known = [(value, row) for value, row in shown if value is not None]
        if known:
            drawings.append(_Scatter(cost, known, order).drawing(prefix))
    return drawings


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """The indices of the points (cost, gain) that no other point beats in both, in order of rising cost."""
    best, front = float("-inf"), []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            front.append(place)
    return front


def references_of(rows: list[Row], key: str | None) -> list[tuple[float, float]]:
    """For each reference its cost (the median, if it was measured several times) and its accuracy in points."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row.reference is not None and key in row.before:
            found.setdefault(row.scale.points(row.reference), []).append(row.before[key])
    return [(statistics.median(costs), accuracy) for accuracy, costs in found.items()]


def _name_of(row: Row) -> str:
    """What a run is called that decomposes nothing."""
    return f"{row.series}, {readable_goal(row.goal)}"


class _Scatter:
    """Runs as marks over one cost: each method's with a line, and those that are not decomposed with their names."""

    def __init__(self, cost: Cost, known: list[tuple[float, Row]], order: list[str]) -> None:
        self.cost, self.order = cost, order
        self.rows = [row for _, row in known]
        self.scale = self.rows[0].scale  # of all of them: other metrics have figures of their own
        self.points = [(value, self.scale.points(row.final or 0.0)) for value, row in known]
        self.references = references_of(self.rows, cost.key)
        # By the rate asked for: of two runs at it, the worse one is not better for having left a rank unused.
        asked = [
            row.rate if cost is RATE and row.rate else x for (x, _), row in zip(self.points, self.rows, strict=True)
        ]
        judged = [(x, y) for x, (_, y) in zip(asked, self.points, strict=True)]
        self.front = pareto([(x, self.scale.gain(y)) for x, y in (*judged, *self.references)])
        self.marks: dict[str, Mark] = {}

    def drawing(self, prefix: str) -> Drawing:
        figure, grid = canvas(8.6, 4.6, right=1.55)
        axes, all_points = grid[0, 0], [*self.points, *self.references]
        edge = list(zip(*(all_points[i] for i in self.front), strict=True))
        axes.step(*edge, where="post", color=MUTED, linewidth=6, alpha=0.25, label="Pareto front")
        for number, series in enumerate(self.order):
            own = [i for i, row in enumerate(self.rows) if row.series == series and not row.is_whole]
            if own:
                self._series(axes, number, series, own)
        names = self._whole(axes)
        references = {self.scale.points(row.reference) for row in self.rows if row.reference is not None}
        for reference in references:
            axes.axhline(reference, color=INK, linestyle="--", linewidth=1, label="reference")
        accuracy_axis(axes, [accuracy for _, accuracy in self.points] + list(references), self.scale)
        self._axis(axes)
        _put_names(axes, names)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        legend = axes.legend(
            handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0
        )
        legend.set_gid(LEGEND)
        labels = [*(row.label for row in self.rows), *("the reference" for _ in self.references)]
        best = ", ".join(f"{labels[i]} {self._with_unit(all_points[i][1])}" for i in self.front)
        heading, title = self.scale.heading, f"{self.scale.subject} against {self.cost.title}"
        text = f"{heading} of {len(self.points)} runs against {self.cost.label}. On the Pareto front: {best}."
        return Drawing(f"{prefix}{self.cost.name}", title, text, figure, self.marks, tuple(self._keys()))

    def _with_unit(self, points: float) -> str:
        return f"{self.scale.number(points)}{self.scale.unit}"

    def _axis(self, axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter

        axes.set_xscale("log")
        plain_log_axis(axes.xaxis)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: self.cost.form(value)))
        asked = sorted({row.rate for row in self.rows if row.rate is not None})
        if self.cost is RATE and asked:
            axes.set_xticks(asked, [f"{rate:g}" for rate in asked])
        axes.set_xlabel(self.cost.label)

    def _keys(self) -> Iterator[Key]:
        shown = {row.series for row in self.rows if not row.is_whole}
        for number, series in enumerate(self.order):
            if series in shown:
                colour, marker = _look(number)
                yield Key.of(series, GLYPHS[marker], colour)
        if self.references or any(row.is_whole for row in self.rows):
            yield Key.of(NOT_DECOMPOSED, GLYPHS[WHOLE], INK)
        yield Key.of("Pareto front", "▬", MUTED)
        if any(row.reference is not None for row in self.rows):
            yield Key.of("reference", "╌", INK)

    def _series(self, axes: Any, number: int, series: str, own: list[int]) -> None:
        """A method's runs as marks, and a line through the means of those with the same goal."""
        colour, marker = _look(number)
        goals: dict[str, list[tuple[float, float]]] = {}
        for i in own:
            goals.setdefault(self.rows[i].goal, []).append(self.points[i])
        means = sorted((sum(x for x, _ in at) / len(at), sum(y for _, y in at) / len(at)) for at in goals.values())
        axes.plot(*zip(*means, strict=True), color=colour, linewidth=1.2, alpha=0.8)
        axes.plot([], [], color=colour, marker=marker, markersize=6, linewidth=1.2, label=legible(series, 30))
        for i in own:
            self._mark(axes, i, marker, colour)

    def _whole(self, axes: Any) -> dict[str, tuple[float, float]]:
        """The runs that decompose nothing, and the reference, as marks; returns their names and places."""
        own = [i for i, row in enumerate(self.rows) if row.is_whole]
        if own or self.references:
            axes.plot([], [], WHOLE, color=INK, markersize=6, label=NOT_DECOMPOSED)
        named: dict[str, tuple[float, float]] = {}
        for i in own:
            self._mark(axes, i, WHOLE, INK)
            named.setdefault(_name_of(self.rows[i]), self.points[i])
        for number, point in enumerate(self.references):
            is_best = len(self.points) + number in self.front
            gid, name = f"reference{number}", "dense, float32"
            axes.plot(*([value] for value in point), WHOLE, color=INK, markersize=9 if is_best else 6, gid=gid)
            size = f"{self.cost.form(point[0])}, {self.cost.label}"
            tip = f"reference: {name}\n{self._with_unit(point[1])} {self.scale.label}\n{size}"
            self.marks[gid] = Mark(tip + ("\non the Pareto front" if is_best else ""))
            named.setdefault(name, point)
        return named

    def _mark(self, axes: Any, i: int, marker: str, colour: str) -> None:
        row, is_best = self.rows[i], i in self.front
        axes.plot(
            *([value] for value in self.points[i]),
            marker,
            color=colour,
            markersize=9 if is_best else 6,
            markeredgecolor=INK if is_best else colour,
            markerfacecolor=colour if row.status == "done" else "none",
            gid=f"run{i}",
        )
        self.marks[f"run{i}"] = Mark(row.tip + ("\non the Pareto front" if is_best else ""), row.link)


def _put_names(axes: Any, named: dict[str, tuple[float, float]]) -> None:
    """Writes names below their places, each a line lower than a name that would touch it."""
    (left, right), (bottom, top) = map(math.log, axes.get_xlim()), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for name, (x, y) in sorted(named.items(), key=lambda one: one[1]):
        across, up = (math.log(x) - left) / (right - left), (y - bottom) / (top - bottom)
        while any(abs(across - other) < NAME_WIDTH and abs(up - height) < NAME_HEIGHT for other, height in taken):
            up -= NAME_HEIGHT
        taken.append((across, up))
        side = "left" if across < NAME_WIDTH / 2 else "right" if across > 1 - NAME_WIDTH / 2 else "center"
        axes.text(
            across, up - NAME_HEIGHT / 2, legible(name, 40), transform=axes.transAxes, ha=side, va="top", fontsize=8.5
        )


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a series."""
    return SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
