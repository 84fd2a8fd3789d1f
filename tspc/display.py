"""What a person sees while it runs: a live bar on a terminal, plain lines in files and pipes."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Protocol

import rich
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("tspc")

VERBOSITIES = ("quiet", "normal", "debug")
PLAIN_WIDTH = 100
PLAIN_INTERVAL = 30.0
"""Seconds between two lines about the same bar where there is no terminal."""


class Bar(Protocol):
    def __enter__(self) -> Bar: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def advance(self, done: int, note: str = "") -> None: ...


class Display:
    """Lines, tables and bars on one console; lines also go to the log."""

    def __init__(self, console: Console | None = None, is_silent: bool = False) -> None:
        self.console = Console(quiet=True) if is_silent else console or rich.get_console()
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH

    def line(self, text: str, style: str = "") -> None:
        """One line of plain text."""
        self.console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)
        logger.info(text)

    def heading(self, text: str) -> None:
        self.line(text, style="bold")

    def show(self, renderable: RenderableType, logged: RenderableType | None = None) -> None:
        """A table, printed and logged; the log can have a longer one."""
        self.console.print(renderable)
        log = Console(width=PLAIN_WIDTH, no_color=True, force_terminal=False)
        with log.capture() as capture:
            log.print(logged or renderable)
        logger.info("\n%s", capture.get().rstrip())

    def bar(self, label: str, total: int) -> Bar:
        """A live bar on a terminal; elsewhere a line at the end, and now and then before it."""
        return _LiveBar(self, label, total) if self.console.is_terminal else _PlainBar(self, label, total)


class _Timed:
    def __init__(self, display: Display, label: str, total: int) -> None:
        self._display, self._label, self._total = display, label, total
        self._note, self._started = "", time.monotonic()

    def _summary(self) -> str:
        parts = [self._label, self._note, f"{time.monotonic() - self._started:.1f} s"]
        return "  ".join(part for part in parts if part)


class _LiveBar(_Timed):
    def __enter__(self) -> Bar:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=self._display.console, transient=True)
        self._task = self._progress.add_task(self._label, total=self._total, note="")
        self._progress.start()
        return self

    def advance(self, done: int, note: str = "") -> None:
        self._note = note
        self._progress.update(self._task, completed=done, note=note)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if kind is None:
            self._display.line(self._summary())


class _PlainBar(_Timed):
    def __enter__(self) -> Bar:
        self._printed = self._started
        return self

    def advance(self, done: int, note: str = "") -> None:
        self._note = note
        now = time.monotonic()
        if done and done < self._total and now - self._printed > PLAIN_INTERVAL:
            left = (now - self._started) / done * (self._total - done)
            self._printed = now
            self._display.line(f"{self._summary()}, {done}/{self._total}, about {left:.0f} s left")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._display.line(self._summary())
