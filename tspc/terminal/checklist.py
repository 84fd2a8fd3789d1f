"""The live view of a run on a terminal: its phases as a checklist, and the progress of the current one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tspc.store.scores import scale_in, value_in

ALIASES = {"pretrain": "reference"}
"""Work that is shown in the row of another phase."""
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 20
"""The largest number of bars of a sparkline."""


def sparkline(values: list[float], width: int = _SPARK) -> str:
    """The values as at most `width` bars of eight heights; each bar is the mean of several neighbours."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    if len(finite) < 2:
        return ""
    size = -(-len(finite) // width)
    means = [sum(part) / len(part) for i in range(0, len(finite), size) if (part := finite[i : i + size])]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


@dataclass
class _Work:
    """The data of the current bar."""

    label: str
    total: int
    done: float = 0
    note: str = ""
    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float | None:
        """Seconds left, estimated from the speed so far; None before the first step."""
        return (time.monotonic() - self.started) / self.done * (self.total - self.done) if self.done else None


@dataclass
class _Row:
    name: str
    text: str = ""
    accuracy: dict[str, Any] | None = None
    seconds: float = 0.0
    work: _Work | None = None
    is_done: bool = False


class Checklist:
    """Rows in the order of the run. Use as a context manager, which keeps the console's last lines alive."""

    def __init__(self, console: Console, phases: Iterable[str]) -> None:
        self._console = console
        self._rows = [_Row(name) for name in phases]
        self._is_plain = not (console.encoding or "").lower().startswith("utf")
        self._is_over = False
        self._live = Live(get_renderable=self.__rich__, console=console, refresh_per_second=5, transient=False)

    def __enter__(self) -> Checklist:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for row in self._rows:
            row.work = None
            row.is_done = row.is_done or kind is None
        self._is_over = True
        self._live.stop()

    def start(self, label: str, total: int) -> _Work:
        """Starts a piece of work; its label begins with the name of its phase."""
        name, _, rest = label.partition(" ")
        row = self._row(ALIASES.get(name, name))
        row.work = _Work(rest.strip() if row.name == ALIASES.get(name, name) else f"{name} {rest.strip()}", total)
        row.is_done = False
        return row.work

    def stop(self, work: _Work) -> None:
        for row in self._rows:
            if row.work is work:
                row.seconds += time.monotonic() - work.started
                row.text, row.work = work.label, None

    def finished(self, phase: str, text: str, accuracy: dict[str, Any] | None) -> None:
        row = self._row(phase)
        row.text, row.accuracy, row.is_done, row.work = text, accuracy, True, None

    def _row(self, name: str) -> _Row:
        """The row of that name; where there is none, that of the phase which comes next."""
        named = (row for row in self._rows if row.name == name)
        following = (row for row in self._rows if not row.is_done)
        return next(named, None) or next(following, None) or self._rows[-1]

    def __rich__(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(min_width=9, no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_column(justify="right", no_wrap=True)
        reference = next((row.accuracy for row in self._rows if row.name == "reference"), None)
        # Always as many lines: a thread of its own draws the view, and one whose height changes eats its neighbours.
        below: RenderableType = "" if self._is_over else " "
        for row in self._rows:
            style = "bold" if row.work else "" if row.is_done else "dim"
            seconds = row.seconds + (time.monotonic() - row.work.started if row.work else 0)
            clock = f"{seconds:.1f} s" if seconds else ""
            grid.add_row(self._mark(row), Text(row.name, style=style), self._state(row, reference), Text(clock))
            if row.work is not None:
                below = self._progress(row.work)
        return Group(grid, below) if below else grid

    def _mark(self, row: _Row) -> Text:
        done, now, later = ("x", ">", ".") if self._is_plain else ("✓", "▸", "·")
        if row.work:
            return Text(now, style="bold cyan")
        return Text(done, style="green") if row.is_done else Text(later, style="dim")

    def _state(self, row: _Row, reference: dict[str, Any] | None) -> Text:
        if row.work is not None:
            return Text("  ".join(part for part in (row.work.label, row.work.note) if part))
        text = Text(row.text)
        if row.accuracy is not None and reference is not None and row.name != "reference":
            scale, before, after = scale_in(row.accuracy), value_in(reference), value_in(row.accuracy)
            style = "green" if scale.drop(before, after) <= 0 else "yellow"
            text.append(f"  {scale.signed(scale.change(before, after))}", style=style)
        return text

    def _progress(self, work: _Work) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        left = "" if work.left is None else f"{work.left:.0f} s left"
        spark = "" if self._is_plain else sparkline(work.losses)
        bar = ProgressBar(total=max(1, work.total), completed=work.done, width=24)
        grid.add_row(
            Text(" " * 10), bar, f"{work.done:.0f}/{work.total}", Text(spark, style="cyan"), Text(left, style="dim")
        )
        return grid
