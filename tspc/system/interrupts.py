"""SIGTERM and SIGINT: training finishes its step and saves, everything else stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tspc.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_received: signal.Signals | None = None
_waits = False


@contextmanager
def handled() -> Iterator[None]:
    """Inside this context a signal raises Interrupted: at once, or inside `deferred` when the code asks for it.

    A second Ctrl-C does not wait. A second SIGTERM waits, because launchers send it more than once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; whoever runs others handles signals there
        return
    global _received
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        _received = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside this context a signal waits until the code asks whether one was `received`."""
    global _waits
    _waits = True
    try:
        yield
    finally:
        _waits = False


def received() -> bool:
    """Whether a signal waits."""
    return _received is not None


def interruption(where: str) -> Interrupted:
    """The exception for the signal that waits."""
    return Interrupted(_received or signal.SIGTERM, where)


def check(where: str) -> None:
    """Raises Interrupted if a signal waits that came after the last check of the training."""
    if received():
        raise interruption(where)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    again = _received == number == signal.SIGINT
    _received = signal.Signals(number)
    if again or not _waits:
        raise Interrupted(_received, "")
