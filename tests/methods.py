"""The table of methods: a method of this package has one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What is known of a method apart from its code.

    `parameters` are those of a kernel with 16 input and 8 output channels and 3 × 5 positions, at a rank; reshaped
    methods split them into (4, 4) and (4, 2), or (2, 2, 4) and (2, 2, 2). `paths` is how many ways there are to compute
    a matrix, and a kernel with positions: 2^(links - 1), or 1 without a chain. A fit has at most `slack` times the
    error of tensorly's; it can end in another local minimum.
    """

    parameters: Callable[..., int]
    paths: tuple[int, int]
    slack: float = 1.001


FAMILIES = ("svd", "cp", "rcp")
"""A chain of two links, a chain of more, and one that reshapes kernels. What does not depend on a
method's arithmetic is tested with these; the laws, with all methods."""

TABLE = {
    "svd": Row(lambda r: r * (16 * 3 + 5 * 8), (2, 2)),
    "id": Row(lambda r: r * (16 * 3 + 5 * 8 - r) + 2, (2, 2)),
    "cp": Row(lambda r: r * (16 + 15 + 8), (2, 4), slack=1.02),
    "tk": Row(lambda a, b: 16 * a + a * b * 15 + b * 8, (2, 4)),
    "tt": Row(lambda a, b, c: 16 * a + a * 3 * b + b * 5 * c + c * 8, (2, 8)),
    "tr": Row(lambda a, b, c, d: 16 * a * b + b * 3 * c + c * 5 * d + d * 8 * a, (2, 8)),
    "rcp": Row(lambda r: r * (4 * 4 + 4 * 2 + 15), (1, 2), slack=1.02),
    "rtk": Row(lambda a, b, c, d: 4 * a + 4 * b + 4 * c + 2 * d + 15 * a * b * c * d, (4, 4), slack=1.02),
    "rtt": Row(lambda a, b, c: 4 * a + a * 4 * b + b * 8 * c + c * 15, (1, 2)),
    "rtr": Row(lambda a, b, c, d: a * 4 * b + b * 4 * c + c * 8 * d + d * 15 * a, (1, 2)),
}
