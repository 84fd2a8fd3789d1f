"""The errors and warnings that tspc raises on purpose; their messages are written for the user."""

from __future__ import annotations

from collections.abc import Iterable
from signal import Signals
from typing import Any


class TspcError(Exception):
    """A mistake that the user can correct; the message names the thing, its value and the likely remedy."""


class TspcWarning(UserWarning):
    """tspc goes on, but not as it was asked to; the message says how, and why. The command shows it as a line."""


class ConfigError(TspcError):
    """One or more settings are wrong; `problems` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class InfeasibleRateError(TspcError):
    """The rate is too small even for rank-1 factors; `smallest` is the smallest possible rate."""

    def __init__(self, message: str, smallest: float) -> None:
        self.smallest = smallest
        super().__init__(message)


class UntimedError(ConfigError):
    """A network or a layer that the runtime does not take, or a runtime that is not there."""


class InfeasibleTimeError(TspcError):
    """A limit on the time that no network of these methods keeps; `fastest` is the least time, in seconds."""

    def __init__(self, message: str, fastest: float) -> None:
        self.fastest = fastest
        super().__init__(message)


class InfeasibleDropError(ConfigError):
    """No network that was tried can be shown to lose so little."""


def shortened(value: Any, longest: int = 80) -> str:
    """A value from a file, as a message shows it: on one line, printable, cut if it is long."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text[: 4 * longest].split()))
    return text if len(text) <= longest else f"{text[:longest]}…"


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first of the names, and how many more there are."""
    shown = list(names)
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")


class DecompositionError(TspcError):
    """A kernel or a rank that a decomposition cannot take."""


class WeightsError(TspcError):
    """A file of weights that cannot be read, or does not fit the network."""


class DataError(TspcError):
    """A data set that is missing, damaged, or not what the configuration says."""


class RunError(TspcError):
    """A run's directory that cannot be used: in use, unwritable, full, or holding something else."""


class TrainingError(TspcError):
    """Training cannot go on, for example because the loss is no longer finite."""


class ExportError(TspcError):
    """A network that cannot be written in a format, or that answers otherwise when read back from it."""


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal; `where` says how far the run came, if its state was saved."""

    def __init__(self, signal: Signals, where: str) -> None:
        self.signal = signal
        progress = f" {where}, which is saved" if where else ""
        super().__init__(f"stopped by {signal.name}{progress}; the same command goes on from there")
