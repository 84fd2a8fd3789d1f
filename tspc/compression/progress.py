"""A progress bar for the library, with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tspc.system.tally import Tally


@contextmanager
def progress_bar(total: int, is_shown: bool) -> Iterator[Tally]:
    """A tally of at most `total` pieces of work, and of those that it is told to expect; a bar shows it."""
    if not is_shown:
        yield Tally(total)
        return
    # rich takes part of a second to import.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), TextColumn("compress"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.description}")) as shown:
        task = shown.add_task("looking at the network", total=total)
        tally = Tally(total, lambda done, of, name: shown.update(task, completed=done, total=of, description=name))
        yield tally
        shown.update(task, completed=tally.total, total=tally.total, description="done")  # some layers stay as they are
