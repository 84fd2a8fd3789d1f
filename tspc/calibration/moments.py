"""The statistics of a layer's inputs, and the best kernel for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tspc.decompositions import Metric, double
from tspc.system import processes
from tspc.system.modes import own_modes

ROWS = 8
"""With this number of rows for each input, second moments are used without a correction."""
LEAST_ROWS = 2
"""With fewer rows for each input than this, the layer's own kernel is the target."""
SCARCITY = 0.1
"""Damping for too few rows, relative to the mean second moment; in proportion to the missing rows."""
NARROW, BLOCKS = 1024, 8
"""Up to this number of columns a product xᵀx is computed as a whole; else in about so many blocks."""
WIDEST_OUTPUT = 4096
"""With more outputs than this, only the diagonals of their second moments and weights are kept."""


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """The square blocks on a matrix's diagonal: groups × T/groups × T/groups."""
    size = len(matrix) // groups
    return matrix.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


@dataclass(frozen=True)
class Statistics:
    """The statistics of a layer's inputs x and wanted outputs y, which are the reference's outputs without bias.

    With `centred`, a constant can be added to the layer's output. The means are then subtracted from all second
    moments. `target` is the best kernel (T × n) from x to y. The other fields have an entry for each group of the
    layer's channels: g groups with t = T/g outputs each, and g = 1 for most layers.

    - `mean_x` (g × n), `mean_y` (g × t);
    - `inputs`: E[xxᵀ] + `damping`·I (g × n × n; `damping` is g × 1 × 1);
    - `cross`: E[yxᵀ] (g × t × n);
    - `outputs`: E[yyᵀ] (g × t × t);
    - `weights`: how much the outputs matter (g × t × t; None: all the same).

    For a layer with more than `WIDEST_OUTPUT` outputs the last two are diagonals (g × t). The kernels of all groups are
    decomposed as one tensor, so they are fitted in one norm, `metric`, from the mean of the groups' inputs.
    """

    target: Tensor
    centred: bool
    mean_x: Tensor
    mean_y: Tensor
    damping: Tensor
    inputs: Tensor
    cross: Tensor
    outputs: Tensor
    weights: Tensor | None

    @cached_property
    def metric(self) -> Metric:
        if self.weights is None:
            outputs = None
        elif self.weights.ndim == 2:
            outputs = self.weights.flatten()
        else:
            outputs = self.weights[0] if len(self.weights) == 1 else torch.block_diag(*self.weights)
        return Metric(self.inputs[0] if len(self.inputs) == 1 else self.inputs.mean(0), outputs)

    def error(self, kernel: Tensor) -> float:
        """The root of E‖y − kernel·x‖² ÷ E‖y‖², with outputs weighted as in the metric; 0: equal to the reference."""
        matrix = self._grouped(kernel)
        if self.weights is None or self.weights.ndim == 2:
            whole = self.outputs if self.outputs.ndim == 2 else self.outputs.diagonal(dim1=1, dim2=2)
            answers = (matrix * (matrix @ self.inputs - self.damping * matrix)).sum(2)
            rest = whole - 2 * (matrix * self.cross).sum(2) + answers
        else:
            whole, product = self.outputs, matrix @ self.cross.mT
            answers = matrix @ self.inputs @ matrix.mT - self.damping * (matrix @ matrix.mT)
            rest = whole - product - product.mT + answers
        lost, size = (float((part if self.weights is None else part * self.weights).sum()) for part in (rest, whole))
        return math.sqrt(max(lost, 0.0) / size) if size > 0 else 0.0

    def shift(self, kernel: Tensor) -> Tensor | None:
        """The constant (T) that gives the layer's output the reference's mean; None if it cannot be added."""
        if not self.centred:
            return None
        return (self.mean_y - (self._grouped(kernel) @ self.mean_x[..., None])[..., 0]).flatten()

    def _grouped(self, kernel: Tensor) -> Tensor:
        return kernel.detach().reshape(self.cross.shape).to(self.cross)


class Moments:
    """First and second moments of rows x (length n); with `targets`, also of pairs with wanted rows y.

    Each of the `groups` of a layer's channels has its own rows and its share of the `targets`. The sums are over
    differences from the mean of the first rows: squares of large numbers would leave no digits for the variance.
    """

    def __init__(self, n: int, targets: int | None, device: torch.device, groups: int = 1) -> None:
        self.count, self.device = 0, device
        self._x = _Sums(n, groups, device)
        self._y = None if targets is None else _Sums(targets // groups, groups, device)
        self._xx, self._yx, self._yy = self._x.square(n), None, None
        if targets is not None and self._y is not None:
            self._yx = self._y.square(n)
            self._yy = self._y.square(targets // groups if targets <= WIDEST_OUTPUT else None)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows x (groups × m × n), and their targets y (m × T).

        Products are taken in the rows' own precision (at least float32) and summed in float64.
        """
        with own_modes(), torch.no_grad():  # also where a network has switched on others for itself
            x = x if x.dtype in (torch.float32, torch.float64) else x.float()
            groups, rows, _ = x.shape
            if rows == 0:  # an expert that none of these images came to
                return
            self.count += rows
            x = self._x.add(x)
            _add_gram_(self._xx, x)
            if self._y is not None and self._yx is not None and self._yy is not None and y is not None:
                y = self._y.add(y.to(x).reshape(rows, groups, -1).transpose(0, 1))
                self._yx += (y.mT @ x).to(self._yx)
                if self._yy.ndim == 3:
                    _add_gram_(self._yy, y)
                else:
                    self._yy += y.square().sum(1).to(self._yy)

    def join(self) -> None:
        """Adds up the sums of all processes."""
        if processes.count() == 1:
            return
        x, dx = self._x, self._x.meet()
        # Σ(a + da)(b + db)ᵀ = Σabᵀ + (Σa)dbᵀ + da(Σb)ᵀ + m·da·dbᵀ, where m rows are seen from another centre.
        self._xx += _moved(x.total, dx, x.total, dx, self.count)
        if (y := self._y) is not None and self._yx is not None and self._yy is not None:
            dy = y.meet()
            self._yx += _moved(y.total, dy, x.total, dx, self.count)
            if self._yy.ndim == 3:
                self._yy += _moved(y.total, dy, y.total, dy, self.count)
            else:
                self._yy += 2 * y.total * dy + self.count * dy.square()
            y.move(dy, self.count)
        x.move(dx, self.count)
        self.count = int(processes.summed(torch.tensor(self.count, device=self.device)))
        totals = (x.total, self._xx, None if y is None else y.total, self._yx, self._yy)
        for total in (total for total in totals if total is not None):
            processes.summed(total)

    def statistics(
        self, kernel: Tensor, centred: bool, damping: float, sensitivity: Tensor | None = None, images: int = 0
    ) -> Statistics:
        """The statistics for a layer with this kernel; may be called once, because it overwrites the sums.

        Without targets the layer's own outputs are the targets. The damping pulls the best kernel towards the layer's
        own, so it does not change in directions that the images did not show. `sensitivity` (T × T, or its diagonal)
        weights the outputs. Rows of the same image are similar. So the number of independent rows is taken as the
        geometric mean of the numbers of rows and of `images`.
        """
        groups, n, _ = self._xx.shape
        matrix = kernel.detach().reshape(groups, -1, n).to(self._xx)
        count = max(self.count, 1)
        mean_x, off_x = self._x.means(count)
        # In place, because each such matrix of a wide layer takes hundreds of megabytes.
        inputs = self._xx.div_(count).baddbmm_(off_x[..., None], off_x[:, None], alpha=-1)
        if not centred:
            inputs.baddbmm_(mean_x[..., None], mean_x[:, None])
        if self._y is None or self._yx is None or self._yy is None:
            mean_y, cross = (matrix @ mean_x[..., None])[..., 0], matrix @ inputs
            outputs = (cross * matrix).sum(2) if len(kernel) > WIDEST_OUTPUT else cross @ matrix.mT
        else:
            mean_y, off_y = self._y.means(count)
            cross = self._yx.div_(count).baddbmm_(off_y[..., None], off_x[:, None], alpha=-1)
            outputs = self._yy.div_(count).sub_(_squares(off_y, self._yy.ndim))
            if not centred:
                cross.baddbmm_(mean_y[..., None], mean_x[:, None])
                outputs.add_(_squares(mean_y, outputs.ndim))
        diagonals = inputs.diagonal(dim1=1, dim2=2)
        size = diagonals.mean(1)[:, None, None]
        shift = torch.where(size > 0, (damping + SCARCITY * scarcity(n, count, images)) * size, 1.0)
        diagonals.add_(shift[..., 0])
        target = matrix
        if self._y is not None and count >= LEAST_ROWS * n:
            target = torch.linalg.solve(inputs, (cross + shift * matrix).mT).mT
        weights = None if sensitivity is None else _by_groups(sensitivity.to(inputs), groups)
        return Statistics(target.flatten(0, 1), centred, mean_x, mean_y, shift, inputs, cross, outputs, weights)


def scarcity(n: int, count: int, images: int) -> float:
    """How much is missing of enough rows. Else the moments are partly noise, and the best kernel follows the noise."""
    independent = math.sqrt(count * min(images, count)) if images else count
    return max(0.0, n / independent - 1 / ROWS)


def _add_gram_(total: Tensor, x: Tensor) -> None:
    """Adds xᵀx (groups × n × n) to `total`. Of a wide one only the blocks up to the diagonal are computed."""
    n = x.shape[2]
    edges = [*list(range(0, n, max(NARROW, -(-n // BLOCKS)))), n]
    for start, end in pairwise(edges):
        strip = (x[..., start:end].mT @ x[..., :end]).to(total)
        total[:, start:end, :end] += strip
        if start:
            total[:, :start, start:end] += strip[..., :start].mT


class _Sums:
    """The sum of rows (length `n`) for each of several groups, relative to a centre near their mean."""

    def __init__(self, n: int, groups: int, device: torch.device) -> None:
        self.total = double(torch.zeros(groups, n, dtype=torch.float32, device=device))
        self.centre: Tensor | None = None

    def square(self, n: int | None) -> Tensor:
        """Zeros for the products with other rows (length `n`); None: for the squares of the entries."""
        return torch.zeros_like(self.total) if n is None else self.total.new_zeros((*self.total.shape, n))

    def add(self, rows: Tensor) -> Tensor:
        """Adds rows (groups × m × n); returns them relative to the centre."""
        if self.centre is None:
            self.centre = rows.mean(1).to(self.total)
        rows = rows - self.centre.to(rows)[:, None]
        self.total += rows.sum(1).to(self.total)
        return rows

    def means(self, count: int) -> tuple[Tensor, Tensor]:
        """The mean of `count` rows, and its difference from the centre."""
        off = self.total / count
        return off if self.centre is None else self.centre + off, off

    def meet(self) -> Tensor:
        """Agrees with the other processes on a centre; returns how the rows move by that."""
        own = torch.zeros_like(self.total) if self.centre is None else self.centre
        self.centre = processes.summed(own.clone()) / processes.count()
        return own - self.centre

    def move(self, by: Tensor, count: int) -> None:
        self.total += count * by


def _moved(a: Tensor, da: Tensor, b: Tensor, db: Tensor, count: int) -> Tensor:
    """The change of Σabᵀ over `count` rows when these move by da and db; `a` and `b` are the sums of the rows."""
    return (a + count * da)[..., None] * db[:, None] + da[..., None] * b[:, None]


def _squares(rows: Tensor, ndim: int) -> Tensor:
    """The products of every row's entries with each other; with `ndim` 2, their squares."""
    return rows.square() if ndim == 2 else rows[..., None] * rows[:, None]


def _by_groups(sensitivity: Tensor, groups: int) -> Tensor:
    return sensitivity.reshape(groups, -1) if sensitivity.ndim == 1 else diagonal_blocks(sensitivity, groups)
