"""A progress bar for the library, with the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnName = Callable[[str], None]


@contextmanager
def progress_bar(total: int, is_shown: bool) -> Iterator[OnName]:
    """Gives a function that is told a layer's name after each of at most `total` pieces of work."""
    if not is_shown:
        yield lambda name: None
        return
    # rich takes part of a second to import.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), TextColumn("compress"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.description}")) as shown:
        task = shown.add_task("looking at the network", total=total)
        yield lambda name: shown.update(task, advance=1, description=name)
        shown.update(task, completed=total, description="done")  # some layers stay as they are
