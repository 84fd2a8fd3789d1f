"""Fits the layers of a plan, and puts them into the compressed network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.gathering import is_narrow
from tspc.calibration.samples import Samples, Survey
from tspc.calibration.sketches import Sketch, sketches_of
from tspc.calibration.statistics import Statistics
from tspc.calibration.tables import tables_of
from tspc.calibration.targets import moments_in_turn
from tspc.compression.curves import naming
from tspc.compression.plan import LayerPlan
from tspc.compression.spreading import over_processes
from tspc.decompositions import Factors, Metric
from tspc.layers.dense import DenseLayer, kernel_of, kernel_shape, set_kernel_
from tspc.layers.forms import TensorizedLayer, tensorize, untrained
from tspc.layers.replacing import replace_layers
from tspc.layers.ties import with_partners
from tspc.system import processes
from tspc.system.parallel import side_by_side
from tspc.traversal.copying import copied

OnLayer = Callable[[LayerPlan, Tensor, Metric | None], None]
"""Called after each layer with its row of the plan, the kernel that was fitted, and the norm or None.

The kernel that was fitted is the layer's own, or the compensated one. For a layer that another process has fitted, it
is the layer's own, and the norm is None."""


class Fits:
    """Replaces layers in `work`, a copy of the reference `model`. `done` has the rows of the plan with the errors.

    The factors of some layers may be `known`; they are only rounded.

    Inside `processes.sharing` each process fits some of the layers that do not depend on each other, and all get all.
    """

    def __init__(
        self, model: nn.Module, work: nn.Module, on_layer: OnLayer, known: Mapping[str, Factors] | None = None
    ) -> None:
        self.work, self.done = work, dict[str, LayerPlan]()
        self._model, self._on_layer, self._known = model, on_layer, known or {}

    def to_moments(self, layers: Sequence[LayerPlan], samples: Samples, survey: Survey) -> None:
        """Fits layers in function space, in the order of their calls; those that are too wide are left out."""
        if samples.settings.compensate:  # each layer needs the network with the layers before it
            self._in_turn(layers, samples, survey)
            return
        called = [x for x in layers if x.name in survey.trace.calls and is_narrow(_dense(self.work, x.name))]
        self._spread(called, survey, lambda some: self._in_turn(some, samples, survey))

    def _in_turn(self, layers: Sequence[LayerPlan], samples: Samples, survey: Survey) -> None:
        rows = {layer.name: layer for layer in layers}
        for name, moments in moments_in_turn(self._model, self.work, list(rows), samples, survey.trace):
            layer = _dense(self.work, name)
            statistics = survey.statistics(name, _dense(self._model, name), moments, samples)
            del moments  # room for the fit
            # Fitted in the precision of the layer, but at least in float32.
            kernel = statistics.target.to(torch.promote_types(kernel_of(layer).dtype, torch.float32))
            kernel = kernel.reshape(kernel_shape(layer))
            module, row = self._fitted(layer, rows[name], kernel, statistics)
            self._shift_(module, statistics, survey.trace.batch_norms.get(name))
            self._keep(module, row, kernel, statistics.metric)

    def to_sketches(self, layers: Sequence[LayerPlan], samples: Samples, survey: Survey) -> None:
        """Fits wide layers to a few of their inputs in the compressed network."""
        self._to_sketches(layers, sketches_of(self.work, [layer.name for layer in layers], samples, survey))

    def to_counts(self, tables: Sequence[LayerPlan], samples: Samples, survey: Survey) -> None:
        """Fits tables of embeddings to how often each token comes."""
        self._to_sketches(tables, tables_of(self.work, [table.name for table in tables], samples, survey))

    def _to_sketches(self, layers: Sequence[LayerPlan], sketches: Iterable[tuple[str, Sketch]]) -> None:
        rows = {layer.name: layer for layer in layers}
        for name, sketch in sketches:
            layer = _dense(self.work, name)
            kernel = sketch.kernel.reshape(kernel_shape(layer))
            self._keep(*self._fitted(layer, rows[name], kernel, sketch), kernel, sketch.metric)

    def to_kernels(self, layers: Sequence[LayerPlan]) -> None:
        """Fits layers to their kernels alone."""

        dense = {layer.name: _dense(self.work, layer.name) for layer in layers}

        def fitted(row: LayerPlan) -> tuple[nn.Module, LayerPlan]:
            return self._fitted(dense[row.name], row, kernel_of(dense[row.name]), None)

        def fit(some: Sequence[LayerPlan]) -> None:
            modules = {}
            for row, (module, found) in side_by_side(fitted, some, size=lambda row: row.dense_params):
                modules[row.name] = module
                self._finish(found, kernel_of(dense[row.name]), None)
            replace_layers(self.work, with_partners(self.work, modules))

        self._spread(layers, None, fit)

    def _fitted(
        self, dense: DenseLayer, layer: LayerPlan, kernel: Tensor, statistics: Statistics | Sketch | None
    ) -> tuple[nn.Module, LayerPlan]:
        return _fitted(dense, layer, kernel, statistics, self._known.get(layer.name))

    def _keep(self, module: nn.Module, row: LayerPlan, kernel: Tensor, metric: Metric | None) -> None:
        replace_layers(self.work, with_partners(self.work, {row.name: module}))
        self._finish(row, kernel, metric)

    def _finish(self, row: LayerPlan, kernel: Tensor, metric: Metric | None) -> None:
        self.done[row.name] = row
        self._on_layer(row, kernel, metric)

    def _spread(
        self, layers: Sequence[LayerPlan], survey: Survey | None, fit: Callable[[Sequence[LayerPlan]], None]
    ) -> None:
        """Fits layers that do not depend on each other, in this process or in several."""
        if not processes.is_shared():
            fit(layers)
            return
        rows = {layer.name: layer for layer in layers}
        norms = {} if survey is None else survey.trace.batch_norms

        def some(names: list[str]) -> dict[str, Any]:
            fit([rows[name] for name in names])
            return {name: self._sent(name, norms.get(name)) for name in names if name in self.done}

        for name, sent in over_processes(layers, survey, some).items():
            if name not in self.done:
                self._receive(rows[name], norms.get(name), *sent)

    def _sent(self, name: str, batch_norm: str | None) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
        """What the other processes need of a layer: the errors, the factors and bias, the mean of its batch norm."""
        row = self.done[name]
        found = {"error": row.error, "output_error": row.output_error, "note": row.note}
        layer = self.work.get_submodule(name)
        state = {key: value.cpu() for key, value in layer.state_dict().items()}
        return found, state, None if batch_norm is None else _mean(self.work, batch_norm).cpu()

    @torch.no_grad()
    def _receive(
        self,
        row: LayerPlan,
        batch_norm: str | None,
        found: dict[str, Any],
        state: dict[str, Tensor],
        mean: Tensor | None,
    ) -> None:
        dense = _dense(self.work, row.name)
        assert row.method is not None
        assert row.rank is not None
        module = untrained(dense, row.method, row.rank, row.path, row.bits)
        module.load_state_dict(state)
        if batch_norm is not None and mean is not None:
            _mean(self.work, batch_norm).copy_(mean)
        self._keep(module.train(dense.training), replace(row, **found), kernel_of(dense), None)

    @torch.no_grad()
    def _shift_(self, module: nn.Module, statistics: Statistics, batch_norm: str | None) -> None:
        """Gives the layer's output the mean of the reference's, through its bias or the batch norm after it."""
        shift = statistics.shift(kernel_of(module).detach())
        if shift is None:
            return
        bias = cast("nn.Parameter | None", module.bias)
        if bias is not None:
            bias += shift.to(bias)
        elif batch_norm is not None:
            mean = _mean(self.work, batch_norm)
            mean -= shift.to(mean)


def _dense(model: nn.Module, name: str) -> DenseLayer:
    return cast(DenseLayer, model.get_submodule(name))


def _mean(model: nn.Module, batch_norm: str) -> Tensor:
    return cast(Tensor, model.get_submodule(batch_norm).running_mean)


def _fitted(
    dense: DenseLayer, layer: LayerPlan, kernel: Tensor, statistics: Statistics | Sketch | None, known: Factors | None
) -> tuple[nn.Module, LayerPlan]:
    """The layer's replacement, and its row with the errors.

    It is tensorized, or dense with a kernel that corrects the errors of earlier layers.
    """
    with naming(layer.name):
        if layer.method is None or layer.rank is None:
            module: nn.Module = copied(dense)
            set_kernel_(module, kernel)
        else:
            metric = None if statistics is None else statistics.metric
            form = {"path": layer.path, "bits": layer.bits}
            module = tensorize(dense, layer.method, layer.rank, kernel=kernel, metric=metric, known=known, **form)
    rebuilt = kernel_of(module).detach()
    note = None
    if isinstance(module, TensorizedLayer):
        with torch.no_grad():
            note = module.decomposition.diagnose(module.factors())
    return module, replace(
        layer,
        error=relative_error(kernel_of(dense), rebuilt),
        output_error=None if statistics is None else statistics.error(rebuilt),
        note=note,
    )


@torch.no_grad()
def relative_error(kernel: Tensor, rebuilt: Tensor) -> float:
    """‖K − K̂‖ ÷ ‖K‖ in the Frobenius norm; 0 if both kernels are zero."""
    # The difference of two close numbers is exact. Only the sums need more digits.
    wide = torch.float32 if kernel.device.type == "mps" else torch.float64
    difference, norm = (torch.linalg.vector_norm(part, dtype=wide) for part in (kernel - rebuilt.to(kernel), kernel))
    return float(difference / norm) if norm > 0 else float(difference)
