"""A progress bar for the library, with the time that is left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from tspc.system.tally import Tally

USUAL, FIT = 64 * 64 * 9, 3
"""A layer with so many kernel entries is one unit of work for the error curves, and so many units for the final fit."""


def work_on(entries: int) -> float:
    """Units of work on a layer, from its kernel's entries: measured times grow about with the side of the matrix."""
    return math.sqrt(entries / USUAL)


@contextmanager
def progress_bar(total: float, is_shown: bool) -> Iterator[Tally]:
    """A tally of at most `total` work, and of what it is told to expect; a bar shows it."""
    if not is_shown:
        yield Tally(total)
        return
    # rich takes part of a second to import.
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), TextColumn("compress"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.description}")) as shown:
        task = shown.add_task("looking at the network", total=total)
        tally = Tally(total, lambda done, of, name: shown.update(task, completed=done, total=of, description=name))
        yield tally
        shown.update(task, completed=tally.total, total=tally.total, description="done")  # some layers stay as they are
