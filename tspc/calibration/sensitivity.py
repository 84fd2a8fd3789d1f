"""How much the network's answer depends on the outputs of its layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.patches import Positions, filled_rows, rows_of
from tspc.calibration.products import Products, Squares, is_diagonal, products_of_outputs
from tspc.calibration.projections import direction_of, with_gradient
from tspc.calibration.row_order import BY_INPUT, arranged_masks
from tspc.calibration.weights import RowWeights
from tspc.data.model_inputs import Given, called, first_of, masks_of
from tspc.errors import TspcWarning, some
from tspc.layers.dense import DenseLayer, output_count
from tspc.system.modes import is_of_inference, own_modes
from tspc.system.parallel import in_parts
from tspc.system.tally import Tally
from tspc.traversal.copying import copied
from tspc.traversal.hooks import Reached, hooked, run_on

IMAGES, FEWEST, NUMBERS = 128, 32, 2**21
"""The most images whose gradients are taken; the fewest that stand for all, and how many numbers in them are enough."""
AT_ONCE = 640_000
"""Numbers in the images whose gradients are taken at once, at least one image: they need the memory of training."""
TOGETHER = 2**28
"""Numbers that the matrices of layers measured in one go may have (a gigabyte); other layers take another go."""
TOKEN = 256
"""A token stands for about so many numbers, as a vector."""
PROBES, LARGE = 2, 2**16
"""Projections of an answer; one for an image with so many numbers, whose layers have many positions."""
ROWS = 16384
"""About so many positions of a layer's gradients are enough."""
SHRINKAGE = 1e-2
"""Least share of the mean added to all outputs alike."""


def output_sensitivity(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Given],
    tally: Tally | None = None,
    short: bool = False,
    weights: RowWeights | None = None,
    orders: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """For each layer G = Σ E[ggᵀ] (T × T), summed over its output positions.

    g is the gradient of a random projection of the network's answer. An error e of the layer's outputs changes the
    answer by about √(eᵀGe). G is the output factor of K-FAC (Martens & Grosse, ICML 2015), with Gaussian projections of
    the logits instead of sampled labels. With few gradients for many outputs, G is shrunk towards a multiple of the
    identity. For a layer with more than `products.WIDEST_OUTPUT` outputs only the diagonal of G is returned (T).

    If the answer is a plain list, tuple or dict, all its tensors are used, else its first tensor with a gradient.
    Inputs without a gradient, such as token numbers, are skipped: gradients stop at the first floating-point
    activations. Layers that do not affect the answer, or cannot be measured, are left out; for the latter a TspcWarning
    says so. The `tally` counts how often gradients are taken. With `short` the network runs in bfloat16. With `weights`
    all batches are used, and what matters of each position is added to them. `orders` tell how the layers arrange their
    rows, see `row_order`; by default input by input.
    """
    model = copied(model) if is_of_inference(model) else model
    lost: list[str] = []
    for part in in_parts(layers, lambda name: _numbers(model.get_submodule(name)), TOGETHER):
        try:
            sums, projections = _measured(model, part, batches, tally or Tally(), short, weights, orders or {})
        except Exception as error:  # the network may be the user's own
            why = next(iter(str(error).splitlines()), type(error).__name__)
            _warn(f"{type(model).__name__} gives no gradients ({why}): the outputs of all layers have equal weights")
            return
        lost += sums.lost
        yield from sums.found(projections)
    if lost:
        _warn(f"no finite gradient of the answer comes to {some(lost, 5)}: their outputs have equal weights")


def _measured(
    model: nn.Module,
    layers: Collection[str],
    batches: Iterable[Given],
    tally: Tally,
    short: bool,
    weights: RowWeights | None,
    orders: Mapping[str, str],
) -> tuple[_Sums, int]:
    """The sums over the gradients of some layers, and the number of projections."""
    # The network may have an operation whose gradient does not know bfloat16.
    for is_short in (True, False) if short else (False,):
        sums = _Sums(model, layers, weights, orders)
        try:
            with _without_parameters(model), hooked(sums.handles()):
                return sums, _backward(model, batches, sums, is_short, tally)
        except Exception:
            if not is_short:
                raise
    raise AssertionError("float32 is the last format")


def _warn(reason: str) -> None:
    warnings.warn(f"calibration.sensitivity: {reason}", TspcWarning, stacklevel=3)


class _Sums:
    """Sums over the gradients of the layers' outputs."""

    def __init__(
        self, model: nn.Module, layers: Collection[str], weights: RowWeights | None, orders: Mapping[str, str]
    ) -> None:
        self._model, self.layers, self.weights, self.orders = model, layers, weights, orders
        self.place: tuple[int, int] = (0, 0)
        """The numbers of the batch, and of the part of it, whose gradients come next."""
        if weights is not None:
            weights.start(layers)
        self._sums: dict[str, Products | Squares] = {}
        self._rows: dict[str, int] = {}
        self._called: dict[str, None] = {}
        self._generator = torch.Generator().manual_seed(0)
        self.masks: list[Tensor] = []
        """Which positions hold something, of the inputs whose gradients come next."""
        self.rows = ROWS
        """The number of positions that count in each of the gradients that come next."""

    def handles(self) -> list[Any]:
        """Hooks on every module. They start the gradients at the first activations, and sum those of the layers."""
        names = {self._model.get_submodule(name): name for name in self.layers}
        return [m.register_forward_hook(self._hook(names.get(m)), prepend=True) for m in _with_hooks(self._model)]

    def _hook(self, name: str | None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if name is not None:
                self._called[name] = None
            if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
                return None
            given = output
            # Copies: a later operation may change the output in place, and then a view would lose its gradient.
            if not output.requires_grad:
                output = output.detach().clone().requires_grad_().clone()
            elif name is not None and output._is_view():
                output = output.clone()
            if name is not None:
                output.register_hook(partial(self._add, name, cast(DenseLayer, module)))
            return None if output is given else output

        return hook

    def _add(self, name: str, layer: DenseLayer, gradient: Tensor) -> None:
        with own_modes(), torch.no_grad():
            if self.weights is not None:
                self.weights.add(name, *self.place, rows_of(layer, gradient))
            masks = arranged_masks(self.masks, self.orders.get(name, BY_INPUT))
            g = rows_of(layer, gradient, Positions(rows=filled_rows(layer, gradient.shape, masks)))
            if len(g) > self.rows:
                # Neighbouring positions tell the same; a fixed step could always meet the same column.
                chosen = torch.randint(len(g), (self.rows,), generator=self._generator, device="cpu").to(g.device)
                g = g[chosen].float() * math.sqrt(len(g) / self.rows)
            if name not in self._sums:
                # Kept in float32; converted to float64 when the layer is fitted.
                self._sums[name] = products_of_outputs(1, g.shape[1], g.device, is_rough=True)
            self._sums[name].add(g.float()[None])
            self._rows[name] = self._rows.get(name, 0) + len(g)

    @property
    def lost(self) -> list[str]:
        """The layers that are called, but get no finite gradient."""
        is_found = lambda name: name in self._sums and bool(self._sums[name].total().isfinite().all())  # noqa: E731
        return [name for name in self._called if not is_found(name)]

    def found(self, projections: int) -> Iterator[tuple[str, Tensor]]:
        for name in list(self._sums):
            total = self._sums.pop(name).total()[0].float() / projections
            size = float(total.sum() if total.ndim == 1 else total.trace())
            if size > 0 and bool(total.isfinite().all()):
                yield name, _shrunk(total, self._rows[name])


@contextmanager
def _without_parameters(model: nn.Module) -> Iterator[None]:
    """Gradients with respect to activations alone."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _numbers(layer: nn.Module) -> int:
    """How many the matrix of a layer holds."""
    outputs = output_count(layer)
    return outputs if is_diagonal(outputs) else outputs**2


def _backward(model: nn.Module, batches: Iterable[Given], sums: _Sums, short: bool, tally: Tally) -> int:
    """Sends random projections of the answers back; returns their number. With `short` the network runs in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    projections = 0
    used = enumerate(enough(batches) if sums.weights is None else batches)
    parts = [(number, part) for number, b in used for part in b.split(max(1, AT_ONCE // _size(model, b)))]
    whole = sum(len(part) for _, part in parts)
    with tally.expecting(len(parts)):
        for place, (number, part) in enumerate(parts):
            sums.place = number, place
            probes = 1 if first_of(part)[0].numel() >= LARGE else PROBES
            sums.rows = max(1, ROWS * len(part) // (whole * probes))
            inputs, sums.masks = part.detach().clone(), masks_of(part)
            if inputs.is_floating_point():
                first_of(inputs).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=short):
                answer = called(model, inputs)
            answers = with_gradient(answer)
            for probe in range(probes):
                projected = sum(
                    (answer.float() * direction_of(answer, generator, sums.masks)).sum() for answer in answers
                )
                # Not by `grad`, which reentrant checkpoints refuse.
                torch.autograd.backward(cast(Tensor, projected), retain_graph=probe + 1 < probes)
            projections += probes * len(part)
            tally.add("how much each layer matters")
    if sums.weights is not None:
        sums.weights.finish(sums.layers, PROBES, sums.orders)
    return projections


def enough(batches: Iterable[Given], most: int | None = IMAGES, fewest: int = FEWEST) -> Iterator[Given]:
    """The first batches, with as many images as show well enough how a network works: of large images fewer.

    About `most` images are enough, whatever their size; None: there is no such limit. At least `fewest` are taken.
    """
    count = 0
    for batch in batches:
        yield batch
        count += len(batch)
        numbers = first_of(batch)[0].numel() * (1 if batch.is_floating_point() else TOKEN)
        needed = max(fewest, NUMBERS // max(1, numbers))
        if count >= (needed if most is None else min(most, needed)):
            return


@torch.no_grad()
def _size(model: nn.Module, batch: Given) -> int:
    """The number of entries of one input, or of the first floating activation if the input has whole numbers."""
    if batch.is_floating_point():
        return first_of(batch)[0].numel()
    sizes = [first_of(batch)[0].numel()]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            sizes.append(output.numel())
            raise Reached

    run_on(model, [module.register_forward_hook(hook) for module in _with_hooks(model)], batch[:1])
    return sizes[-1]


def _with_hooks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def _shrunk(sums: Tensor, rows: int) -> Tensor:
    share = max(SHRINKAGE, min(1.0, len(sums) / rows))
    if sums.ndim == 1:
        return (1 - share) * sums + share * sums.mean()
    mean = sums.diagonal().mean()
    return (1 - share) * sums + share * mean * torch.eye(len(sums), dtype=sums.dtype, device=sums.device)
