"""Block coordinate descent with extrapolation, for fits that solve for one factor after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor


class Point(Protocol):
    """The factors after a sweep, and the value of the objective there."""

    @property
    def parts(self) -> Sequence[Tensor]: ...

    @property
    def objective(self) -> float: ...


P = TypeVar("P", bound=Point)


@dataclass(frozen=True)
class Steps:
    """How far a sweep starts beyond the last one, in units of the last change: at first `first`, at most `longest`.

    The step grows by `growth` after each sweep, and halves after one that went too far. The sweeps end after
    `patience` small gains in a row.
    """

    first: float = 1.0
    longest: float = 1.0
    growth: float = 1.0
    patience: int = 1


def descend(start: P, sweep: Callable[[Sequence[Tensor]], P], max_iterations: int, tolerance: float, steps: Steps) -> P:
    """Sweeps until the root of the objective falls by less than the share `tolerance`; the best point.

    Each sweep starts from factors that are extrapolated along the last change. A sweep is undone if the extrapolation
    went too far (Ang, Cohen, Gillis & Hien, "Accelerating block coordinate descent for nonnegative tensor
    factorization", Numer. Linear Algebra Appl. 2021).
    """
    best, guess, step, slow = start, start.parts, steps.first, 0
    for _ in range(max_iterations):
        found = sweep(guess)
        gain = best.objective - found.objective
        if gain <= 0:
            if guess is best.parts:
                break
            guess, step = best.parts, step / 2
            continue
        slow = slow + 1 if gain <= 2 * tolerance * found.objective else 0
        if slow == steps.patience:
            return found
        guess = [new + step * (new - old) for new, old in zip(found.parts, best.parts, strict=True)]
        best, step = found, min(step * steps.growth, steps.longest)
    return best
