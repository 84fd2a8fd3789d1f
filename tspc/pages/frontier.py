"""The picture of a frontier: expected errors of the layers' outputs against bytes, and against milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tspc.pages.benchmark import readable_bytes
from tspc.pages.drawing import MUTED, SERIES, Drawing, Mark, canvas, plain_log_axis, style
from tspc.store.files import read_json
from tspc.store.schemas import FRONTIER


def write_frontier(path: Path) -> Path:
    """Draws the points in the file `path` into `frontier.png` and `frontier.svg` beside it; returns the picture's path.

    Raises RunError if the file cannot be read or the picture cannot be written.
    """
    found = read_json(path, FRONTIER)
    with style():
        _drawing(found).save(path.parent)
    return path.with_suffix(".png")


def _drawing(found: dict[str, Any]) -> Drawing:
    runtime = found["runtime"]
    points = [("by size", point) for point in found["by_size"]] + [("by time", point) for point in found["by_time"]]
    points = [(kind, point) for kind, point in points if point["error"] is not None]
    axes_of = ["bytes", *(["seconds"] if runtime else [])]
    figure, grid = canvas(4.4 * len(axes_of), 3.1, 1, len(axes_of), left=0.75, bottom=0.6, top=0.3, sharey=True)
    marks = {}
    for column, key in enumerate(axes_of):
        axes = grid[0, column]
        factor = 1000.0 if key == "seconds" else 1e-6
        for number, (kind, marker) in enumerate((("by size", "o"), ("by time", "s"))):
            own = sorted((point[key] * factor, point["error"], point["goal"]) for k, point in points if k == kind)
            if not own:
                continue
            best = [point for point in own if all(point[1] < other[1] for other in own if other[0] < point[0])]
            axes.plot([x for x, _, _ in best], [y for _, y, _ in best], color=SERIES[number], linewidth=1, alpha=0.5)
            for place, (x, y, goal) in enumerate(own):
                gid = f"{key}{number}-{place}"
                axes.plot([x], [y], marker, color=SERIES[number], markersize=6, gid=gid)
                axes.annotate(goal.partition("=")[2], (x, y), (5, 5), textcoords="offset points", fontsize=8)
                marks[gid] = Mark(f"{goal}\nexpected error {y:.3f}")
        axes.axvline(found["dense"][key] * factor, color=MUTED, linestyle="--", linewidth=1)
        axes.set_xlabel("MB of the network" if key == "bytes" else f"expected ms in {runtime}")
        axes.set_xscale("log")
        plain_log_axis(axes.xaxis)
    grid[0, 0].set_ylabel("expected output error")
    grid[0, 0].set_title("circles: the rates or sizes; squares: the speedups; dashed: dense", loc="left", fontsize=8)
    size = readable_bytes(found["dense"]["bytes"])
    text = f"What {found['method']} can make of a network of {size}, before any training."
    return Drawing("frontier", "Frontier", text, figure, marks)
