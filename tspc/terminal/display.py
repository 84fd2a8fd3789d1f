"""The output during a run: a live checklist on a terminal, plain lines in files and pipes."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import rich
from rich.console import Console, RenderableType

from tspc.errors import TspcWarning
from tspc.terminal.checklist import Checklist

logger = logging.getLogger("tspc")

VERBOSITIES = ("quiet", "normal", "debug")
PLAIN_WIDTH = 100
PLAIN_INTERVAL = 30.0
"""Seconds between two lines about the same bar, if there is no terminal."""


class Bar(Protocol):
    def __enter__(self) -> Bar: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def advance(self, done: float, note: str = "", loss: float | None = None) -> None: ...


class Display:
    """Lines, tables and bars on one console; lines also go to the log.

    `verbosity` is one of VERBOSITIES: `quiet` prints warnings only, `debug` also every piece of work and every layer.
    """

    def __init__(self, console: Console | None = None, is_silent: bool = False, verbosity: str = "normal") -> None:
        self.console = Console(quiet=True) if is_silent else console or rich.get_console()
        self.verbosity = verbosity
        self._checklist: Checklist | None = None
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH

    @property
    def _is_quiet(self) -> bool:
        return self.verbosity == "quiet"

    def line(self, text: str, style: str = "") -> None:
        """One line of plain text."""
        if not self._is_quiet:
            self._print(text, style)
        logger.info(text)

    def warn(self, text: str) -> None:
        """A line that is also printed with `quiet`."""
        self._print(text, "yellow")
        logger.warning(text)

    def heading(self, text: str) -> None:
        self.line(text, style="bold")

    def finished(self, phase: str, text: str, accuracy: dict[str, Any] | None = None) -> None:
        """Reports the end of a phase; `accuracy` is the record of what it reached."""
        line = f"{phase:<9}  {text}"
        if self._checklist is None:
            self.line(line, style="bold")
            return
        self._checklist.finished(phase, text, accuracy)
        logger.info(line)

    def show(self, renderable: RenderableType, logged: RenderableType | None = None) -> None:
        """Prints and logs a table. `logged` is a longer one for the log; `debug` prints it, too."""
        if not self._is_quiet:
            self.console.print(logged if logged and self.verbosity == "debug" else renderable)
        log = Console(width=PLAIN_WIDTH, no_color=True, force_terminal=False)
        with log.capture() as capture:
            log.print(logged or renderable)
        logger.info("\n%s", capture.get().rstrip())

    @contextmanager
    def checklist(self, phases: Iterable[str]) -> Iterator[None]:
        """On a terminal: a live view of the phases, below all other output. Elsewhere nothing."""
        console = self.console
        if self._is_quiet or console.quiet or not console.is_terminal or console.is_dumb_terminal:
            yield
            return
        with Checklist(console, phases) as made:
            self._checklist = made
            try:
                yield
            finally:
                self._checklist = None

    def bar(self, label: str, total: int) -> Bar:
        """A bar in the live view; elsewhere a line now and then, and a line at the end."""
        if self._checklist is None:
            return _PlainBar(self, label, total)
        return _LiveBar(self, label, total, self._checklist)

    def _print(self, text: str, style: str) -> None:
        # With a live view a line must fit the terminal: rich counts it as one line, but it would take two.
        is_free = self._checklist is None
        self.console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=is_free)


class _Timed:
    def __init__(self, display: Display, label: str, total: int) -> None:
        self._display, self._label, self._total = display, label, total
        self._note, self._started = "", time.monotonic()

    def _summary(self) -> str:
        parts = [self._label, self._note, f"{time.monotonic() - self._started:.1f} s"]
        return "  ".join(part for part in parts if part)


class _LiveBar(_Timed):
    def __init__(self, display: Display, label: str, total: int, checklist: Checklist) -> None:
        super().__init__(display, label, total)
        self._checklist = checklist

    def __enter__(self) -> Bar:
        self._work = self._checklist.start(self._label, self._total)
        return self

    def advance(self, done: float, note: str = "", loss: float | None = None) -> None:
        self._note = self._work.note = note
        self._work.done = done
        if loss is not None:
            self._work.losses.append(loss)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checklist.stop(self._work)
        if kind is None and self._display.verbosity == "debug":
            self._display.line(self._summary())
        elif kind is None:
            logger.info(self._summary())


class _PlainBar(_Timed):
    def __enter__(self) -> Bar:
        self._printed = self._started
        return self

    def advance(self, done: float, note: str = "", loss: float | None = None) -> None:
        self._note = note
        now = time.monotonic()
        if done and done < self._total and now - self._printed > PLAIN_INTERVAL:
            left = (now - self._started) / done * (self._total - done)
            self._printed = now
            self._display.line(f"{self._summary()}, {done:.0f}/{self._total}, about {left:.0f} s left")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._display.line(self._summary())


@contextmanager
def shown_warnings(display: Display) -> Iterator[None]:
    """A context in which a TspcWarning is shown once, as a line. Warnings of libraries go to the log of the run.

    With the verbosity `debug` the warnings of libraries are printed as usual.
    """
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, TspcWarning):
            usual(message, category, *where)
        elif str(message) not in seen:
            seen.add(str(message))
            display.warn(str(message))

    logs = display.verbosity != "debug"
    with warnings.catch_warnings():
        warnings.simplefilter("always", TspcWarning)
        logging.captureWarnings(logs)
        usual, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        finally:
            warnings.showwarning = usual
            logging.captureWarnings(False)
