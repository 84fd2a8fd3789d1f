"""Counts pieces of work, so that a bar can show how much is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


def _nowhere(done: float, total: float, name: str) -> None:
    """Shows nothing."""


@dataclass
class Tally:
    """How much of the `total` work is `done`. `show(done, total, name)` is called after each piece.

    The unit is a small piece of work. The total grows when more work is expected.
    """

    total: float = 0
    show: Callable[[float, float, str], None] = _nowhere
    done: float = 0

    def add(self, name: str, size: float = 1) -> None:
        """Counts one piece; `name` says what it was about."""
        self.done += size
        self.show(self.done, max(self.done, self.total), name)

    @contextmanager
    def expecting(self, pieces: int) -> Iterator[None]:
        """Inside this context about so many pieces will be done. Afterwards the total has the number that were."""
        self.total += pieces
        before = self.done
        try:
            yield
        finally:
            self.total += self.done - before - pieces


class Counted(Protocol):
    tally: Tally


@contextmanager
def counting(counted: Counted | None, tally: Tally) -> Iterator[None]:
    """Inside this context the work on an object goes to this tally."""
    if counted is None:
        yield
        return
    before, counted.tally = counted.tally, tally
    try:
        yield
    finally:
        counted.tally = before
