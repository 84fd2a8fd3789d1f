"""Sums over the inputs of a layer, and over the outputs that are wanted of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from typing import cast

import torch
from torch import Tensor

from tspc.calibration.products import Products, is_diagonal, products_of_outputs
from tspc.calibration.statistics import Statistics, metric_of
from tspc.decompositions import Metric, double
from tspc.system import processes
from tspc.system.modes import own_modes

ROWS = 8
"""With this number of rows for each input, second moments are used without a correction."""
LEAST_ROWS = 2
"""With fewer rows for each input than this, the layer's own kernel is the target."""
SCARCITY = 0.1
"""Damping for too few rows, relative to the mean second moment; in proportion to the missing rows."""


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """The square blocks on a matrix's diagonal: groups × T/groups × T/groups."""
    size = len(matrix) // groups
    return matrix.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


class Moments:
    """First and second moments of rows x (length n); with `targets`, also of pairs with wanted rows y.

    Each of the `groups` of a layer's channels has its own rows and its share of the `targets`. The sums are over
    differences from the mean of the first rows: squares of large numbers would leave no digits for the variance.
    """

    def __init__(self, n: int, targets: int | None, device: torch.device, groups: int = 1) -> None:
        self._inputs, self.device = _Inputs(n, groups, device), device
        self._pairs = None if targets is None else _Pairs(n, targets, groups, device)

    def beside(self, targets: int | None) -> Moments:
        """Moments of the same rows with other targets. `add` of this object adds to both."""
        found = copy(self)
        found._pairs = None if targets is None else _Pairs(self._inputs.n, targets, self._inputs.groups, self.device)
        return found

    @property
    def count(self) -> int:
        """The number of rows."""
        return self._inputs.count

    def add(
        self,
        x: Tensor,
        y: Tensor | None = None,
        others: Iterable[tuple[Moments, Tensor]] = (),
        weights: Tensor | None = None,
    ) -> None:
        """Adds rows x (groups × m × n), and their targets y (m × T); for moments beside these, their own targets.

        `weights` (m) say how much each row counts; by default all count 1.
        Products are taken in the rows' own precision (at least float32) and summed in float64.
        """
        with own_modes(), torch.no_grad():  # also where a network has switched on others for itself
            x = x if x.dtype in (torch.float32, torch.float64) else x.float()
            if x.shape[1] == 0:  # an expert that none of these images came to
                return
            weights = None if weights is None else weights.to(x)
            x = self._inputs.add(x, weights)
            for moments, targets in ((self, y), *others):
                if moments._pairs is not None and targets is not None:
                    moments._pairs.add(x, targets, weights)

    def join(self) -> None:
        """Adds up the sums of all processes."""
        if processes.count() == 1:
            return
        x, count = self._inputs.sums, self._inputs.weight
        # The pairs first: they need the sums of this process alone.
        dx = x.meet()
        if self._pairs is not None:
            self._pairs.join(x, dx, count)
        self._inputs.join(dx)

    def statistics(
        self, kernel: Tensor, centred: bool, damping: float, sensitivity: Tensor | None = None, images: int = 0
    ) -> Statistics:
        """The statistics for a layer with this kernel; may be called once, because it overwrites the sums.

        Moments beside each other share the input's part, so all are called with the same `centred`, `damping` and
        `images`. Without targets the layer's own outputs are the targets. The damping pulls the best kernel towards the
        layer's own, so it does not change in directions that the images did not show. `sensitivity` (T × T, or its
        diagonal) weights the outputs. Rows of the same image are similar. So the number of independent rows is taken as
        the geometric mean of the numbers of rows and of `images`.
        """
        x = self._inputs
        inputs, shift = x.finished(centred, damping, images)
        matrix = kernel.detach().reshape(x.groups, -1, x.n).to(inputs)
        target = matrix
        if self._pairs is None:
            mean_y, cross = (matrix @ x.mean[..., None])[..., 0], matrix @ inputs - shift * matrix
            outputs = (cross * matrix).sum(2) if is_diagonal(len(kernel)) else cross @ matrix.mT
        else:
            mean_y, cross, outputs = self._pairs.finished(x, centred)
            if x.count >= LEAST_ROWS * x.n:
                target = x.solve((cross + shift * matrix).mT).mT
        weights = _by_groups(sensitivity, inputs)
        return Statistics(target.flatten(0, 1), centred, x.mean, mean_y, shift, inputs, cross, outputs, weights)

    def metric(self, centred: bool, damping: float, sensitivity: Tensor | None = None, images: int = 0) -> Metric:
        """The norm of the `statistics` alone, which takes less work."""
        inputs, _ = self._inputs.finished(centred, damping, images)
        return metric_of(inputs, _by_groups(sensitivity, inputs))


class _Inputs:
    """The sums over the rows x, and then their second moments."""

    mean: Tensor
    off: Tensor

    def __init__(self, n: int, groups: int, device: torch.device) -> None:
        self.n, self.groups, self.count, self.weight = n, groups, 0, 0.0
        self.sums = _Sums(n, groups, device)
        self._xx = Products(groups, n, None, device)
        self._shift: Tensor | None = None
        self._factor: Tensor | None = None

    def add(self, x: Tensor, weights: Tensor | None) -> Tensor:
        self.count += x.shape[1]
        self.weight += x.shape[1] if weights is None else float(weights.sum())
        x = self.sums.add(x, weights)
        self._xx.add(x)
        return x

    def join(self, dx: Tensor) -> None:
        x, xx = self.sums, self._xx.total()
        xx += _moved(x.total, dx, x.total, dx, self.weight)
        x.move(dx, self.weight)
        self.count = int(processes.summed(torch.tensor(self.count, device=dx.device)))
        self.weight = float(processes.summed(double(torch.tensor(self.weight, device=dx.device))))
        processes.summed(x.total)
        processes.summed(xx)

    def finished(self, centred: bool, damping: float, images: int) -> tuple[Tensor, Tensor]:
        """The damped second moments (groups × n × n), and the damping (groups × 1 × 1); computed once."""
        xx = self._xx.total()
        if self._shift is None:
            self.mean, self.off = self.sums.means(self.weight or 1)
            # In place, because each such matrix of a wide layer takes hundreds of megabytes.
            xx.div_(self.weight or 1).baddbmm_(self.off[..., None], self.off[:, None], alpha=-1)
            if not centred:
                xx.baddbmm_(self.mean[..., None], self.mean[:, None])
            diagonals = xx.diagonal(dim1=1, dim2=2)
            size = diagonals.mean(1)[:, None, None]
            share = damping + SCARCITY * scarcity(self.n, max(self.count, 1), images)
            self._shift = torch.where(size > 0, share * size, 1.0)
            diagonals.add_(self._shift[..., 0])
        return xx, self._shift

    def solve(self, right: Tensor) -> Tensor:
        """The inverse of the damped second moments, times a matrix for each group."""
        if self._factor is None:
            xx = self._xx.total()
            factor, failed = torch.linalg.cholesky_ex(xx)
            if bool(failed.any()):  # too little damping for so many zeros
                return torch.linalg.solve(xx, right)
            self._factor = cast(Tensor, factor)
        return torch.cholesky_solve(right, self._factor)


class _Pairs:
    """The sums over the wanted rows y, and over their products with x and with themselves."""

    def __init__(self, n: int, targets: int, groups: int, device: torch.device) -> None:
        own = targets // groups
        self.sums = _Sums(own, groups, device)
        self._yx = Products(groups, own, n, device)
        self._yy = products_of_outputs(groups, targets, device)

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        """Adds targets (m × T) of the rows x (groups × m × n), which are relative to their centre, and weighted."""
        y = self.sums.add(y.to(x).reshape(x.shape[1], len(x), -1).transpose(0, 1), weights)
        self._yx.add(y, x)
        self._yy.add(y)

    def join(self, x: _Sums, dx: Tensor, count: float) -> None:
        y, yx, yy = self.sums, self._yx.total(), self._yy.total()
        dy = y.meet()
        # Σ(a + da)(b + db)ᵀ = Σabᵀ + (Σa)dbᵀ + da(Σb)ᵀ + m·da·dbᵀ, where m rows are seen from another centre.
        yx += _moved(y.total, dy, x.total, dx, count)
        if yy.ndim == 3:
            yy += _moved(y.total, dy, y.total, dy, count)
        else:
            yy += 2 * y.total * dy + count * dy.square()
        y.move(dy, count)
        for total in (y.total, yx, yy):
            processes.summed(total)

    def finished(self, x: _Inputs, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of y, and the second moments of y with x and with y."""
        count = x.weight or 1
        mean, off = self.sums.means(count)
        cross = self._yx.total().div_(count).baddbmm_(off[..., None], x.off[:, None], alpha=-1)
        outputs = self._yy.total()
        outputs.div_(count).sub_(_squares(off, outputs.ndim))
        if not centred:
            cross.baddbmm_(mean[..., None], x.mean[:, None])
            outputs.add_(_squares(mean, outputs.ndim))
        return mean, cross, outputs


def scarcity(n: int, count: int, images: int) -> float:
    """How much is missing of enough rows. Else the moments are partly noise, and the best kernel follows the noise."""
    independent = math.sqrt(count * min(images, count)) if images else count
    return max(0.0, n / independent - 1 / ROWS)


class _Sums:
    """The sum of rows (length `n`) for each of several groups, relative to a centre near their mean."""

    def __init__(self, n: int, groups: int, device: torch.device) -> None:
        self.total = double(torch.zeros(groups, n, dtype=torch.float32, device=device))
        self.centre: Tensor | None = None

    def add(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Adds rows (groups × m × n); returns them relative to the centre, times the roots of their weights (m)."""
        if self.centre is None:
            self.centre = rows.mean(1).to(self.total)
        rows = rows - self.centre.to(rows)[:, None]
        if weights is None:
            self.total += rows.sum(1).to(self.total)
            return rows
        self.total += (rows * weights[:, None]).sum(1).to(self.total)
        return rows * weights.sqrt()[:, None]

    def means(self, count: float) -> tuple[Tensor, Tensor]:
        """The mean of `count` rows, and its difference from the centre."""
        off = self.total / count
        return off if self.centre is None else self.centre + off, off

    def meet(self) -> Tensor:
        """Agrees with the other processes on a centre; returns how the rows move by that."""
        own = torch.zeros_like(self.total) if self.centre is None else self.centre
        self.centre = processes.summed(own.clone()) / processes.count()
        return own - self.centre

    def move(self, by: Tensor, count: float) -> None:
        self.total += count * by


def _moved(a: Tensor, da: Tensor, b: Tensor, db: Tensor, count: float) -> Tensor:
    """The change of Σabᵀ over `count` rows when these move by da and db; `a` and `b` are the sums of the rows."""
    return (a + count * da)[..., None] * db[:, None] + da[..., None] * b[:, None]


def _squares(rows: Tensor, ndim: int) -> Tensor:
    """The products of every row's entries with each other; with `ndim` 2, their squares."""
    return rows.square() if ndim == 2 else rows[..., None] * rows[:, None]


def _by_groups(sensitivity: Tensor | None, inputs: Tensor) -> Tensor | None:
    """The weights of the outputs of each group, in the format of the inputs' second moments."""
    if sensitivity is None:
        return None
    wide, groups = sensitivity.to(inputs), len(inputs)
    return wide.reshape(groups, -1) if wide.ndim == 1 else diagonal_blocks(wide, groups)
