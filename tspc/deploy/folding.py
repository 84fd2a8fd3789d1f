"""Networks for inference: plain modules, with batch norms folded into the layers before them."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.data.arranging import inputs_of
from tspc.data.model_inputs import Given, called, first_of
from tspc.errors import DataError, TspcWarning
from tspc.layers.chains import REBUILT
from tspc.layers.dense import AXES, DenseLayer, kernel_of, kind_of, set_kernel_
from tspc.layers.forms import Chain, Table, TensorizedLayer, tensorized_layers
from tspc.layers.norms import BatchNorm, is_exact, is_untouched
from tspc.layers.replacing import forbid_save_pretrained_, replace_layer, saves_pretrained
from tspc.models.lazy import require_sizes
from tspc.system.modes import own_modes
from tspc.traversal.copying import copied
from tspc.traversal.nested import tensors_in
from tspc.traversal.tracing import trace

TOLERANCE = 1e-4
"""The allowed difference from the unfolded network's answers, relative to the largest, besides rounding."""
UNSAID = 2e-5
"""Up to here nothing is said: for other images it is hardly ever five times as much."""

Swap = dict[str, nn.Module]
"""Modules, by name, that are replaced together."""


@own_modes()
@torch.no_grad()
def fold_batch_norms(model: nn.Module, images: Given | Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network for inference, in eval mode. It gives the same answers up to rounding, and runs faster.

    Tensorized layers become the ordinary convolutions or dense layers of their paths. If the input of a batch norm is
    exactly the output of one convolution or dense layer, it is folded into that layer's kernel and bias. `images` is an
    input of the network, or a dict of its arguments; one pass finds these batch norms. Batch norms of other classes,
    over other axes, or with hooks stay. The copy runs without tspc, but has no factors to train: a layer on the path
    "rebuilt" is as large as the dense one.

    The copy is tried on `images` before it is returned. Its answers differ from the network's by at most 1e-4 of the
    largest. They may differ more if the network's own rounding is as large; a TspcWarning says so, unless the numbers
    have 16 bits. A fold that would change the answers is left out, with a TspcWarning. Raises DataError if the network
    cannot take the images, or returns nothing that can be compared.
    """
    require_sizes(model)
    small = copied(model).eval()
    images = inputs_of(model, images)
    answers = _Answers(model, small, images)
    layers = tensorized_layers(small)
    # If the network reads the weight of a layer, there must be one, so the kernel is rebuilt.
    left = _swap_(small, [{name: plain(layer)} for name, layer in layers.items()], answers.are_the_same)
    left = _swap_(small, [{name: plain(layers[name], REBUILT)} for swap in left for name in swap], answers.are_the_same)
    folds = list(_folds(small, images))
    left += _swap_(small, folds, answers.are_the_same)
    if left:
        names = ", ".join(name for swap in left for name in swap)
        message = f"the network gives other answers, or fails, with these modules folded, so they stay: {names}"
        warnings.warn(message, TspcWarning, stacklevel=2)
    answers.tell_rounding()
    if layers or folds:
        for module in saves_pretrained(small):
            forbid_save_pretrained_(module)
    return small


class _Answers:
    """A network's answers to some images, compared with its copy's. Raises DataError if they cannot be compared."""

    def __init__(self, original: nn.Module, model: nn.Module, images: Given) -> None:
        self._original, self._model, self._images = original, model, images
        try:
            self._wanted = _answers(model, images)
        except Exception as error:  # the network may be the user's own
            raise DataError(
                f"the network cannot take images of shape {tuple(first_of(images).shape)}: {error}"
            ) from error
        if not any(bool(answer.isfinite().any()) for answer in self._wanted):
            raise DataError("the network answers the images with no finite number: folding cannot be checked")

    @cached_property
    def _slack(self) -> list[float]:
        """The allowed difference of each answer; for rounding, twice the network's own difference from float64."""
        slack = [TOLERANCE * _largest(answer) for answer in self._wanted]
        try:
            images = self._images.double() if self._images.is_floating_point() else self._images
            exact = _answers(copied(self._original).eval().double(), images)
        except Exception:  # a network that does not run in float64
            return slack
        for number, (answer, other) in enumerate(zip(self._wanted, exact, strict=False)):
            far, largest = _distance(answer, other), _largest(answer)
            if 0 < far < 0.1 * largest:
                step = torch.finfo(answer.dtype).eps * largest
                slack[number] = max(slack[number], 2 * (far + step))
        return slack

    def _distances(self) -> list[float] | None:
        """Differences of the copy's answers from the network's; None if they are of another kind, or the copy fails."""
        try:
            given = _answers(self._model, self._images)
        except Exception:  # for example, an attribute of a replaced module is missing
            return None
        kinds = [[(answer.shape, answer.dtype) for answer in answers] for answers in (given, self._wanted)]
        return list(map(_distance, given, self._wanted)) if kinds[0] == kinds[1] else None

    def _are_within(self, distances: list[float], share: float) -> bool:
        return all(d <= share * _largest(wanted) for d, wanted in zip(distances, self._wanted, strict=True))

    def are_the_same(self) -> bool:
        distances = self._distances()
        if distances is None or self._are_within(distances, UNSAID):
            return distances is not None
        return all(d <= slack for d, slack in zip(distances, self._slack, strict=True))

    def tell_rounding(self) -> None:
        """Warns if the answers of the copy differ more than the rounding of float32 usually explains."""
        distances = self._distances() or []
        shares = [
            distance / _largest(wanted)
            for distance, wanted in zip(distances, self._wanted, strict=False)
            if distance > UNSAID * _largest(wanted) and torch.finfo(wanted.dtype).eps < UNSAID
        ]
        if shares:
            warnings.warn(
                f"folding changed the answers by {max(shares):.1g} of the largest: this network amplifies rounding "
                "errors",
                TspcWarning,
                stacklevel=3,
            )


def _answers(model: nn.Module, images: Given) -> list[Tensor]:
    """The tensors in a network's answer; a fixed seed is set, in case it draws random numbers."""
    device = first_of(images).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return [answer.clone() for answer in tensors_in(called(model, images.clone()))]


def _largest(answer: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    if not (answer.is_floating_point() or answer.is_complex()):
        return 0.0
    finite = answer[answer.isfinite()]
    return float(finite.abs().double().max()) if finite.numel() else 0.0


def _distance(given: Tensor, wanted: Tensor) -> float:
    """The largest difference of two entries; infinite if the two are not finite in the same places."""
    if given.shape != wanted.shape:
        return float("inf")
    wide = torch.complex128 if given.is_complex() else torch.float64
    given, wanted = given.to(wide), wanted.to(wide)
    finite = wanted.isfinite()
    if not torch.equal(finite, given.isfinite()):
        return float("inf")
    difference = (given[finite] - wanted[finite]).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _swap_(model: nn.Module, swaps: Sequence[Swap], holds: Callable[[], bool]) -> list[Swap]:
    """Makes as many swaps as possible such that `holds` is true; returns the others, which are undone.

    Swaps that fail together are halved and tried again.
    """
    before = [{name: model.get_submodule(name) for name in swap} for swap in swaps]
    _put_(model, swaps)
    if not swaps or holds():
        return []
    _put_(model, before)
    if len(swaps) == 1:
        return list(swaps)
    half = len(swaps) // 2
    return _swap_(model, swaps[:half], holds) + _swap_(model, swaps[half:], holds)


def _put_(model: nn.Module, swaps: Sequence[Swap]) -> None:
    for swap in swaps:
        for name, module in swap.items():
            replace_layer(model, name, module)


def plain(layer: TensorizedLayer, path: str | None = None) -> nn.Module:
    """The convolutions or dense layers that a tensorized layer's path runs, with weights of their own, in eval mode.

    Several are in a Sequential, which has the attributes of the dense layer (`in_features`, `stride`, …).
    """
    layer = copied(layer).eval()
    layer.path = path or layer.path
    if isinstance(layer, Table):
        return layer.as_embedding().eval()
    if isinstance(layer, Chain) and layer.runs_factors:
        return _showing(list(layer), layer)
    with torch.no_grad():
        kernels = layer.kernels()
    modules: list[nn.Module] = []
    for i, (stage, kernel) in enumerate(zip(layer.stages, kernels, strict=True)):
        bias = cast("nn.Parameter | None", layer.bias) if i == len(kernels) - 1 else None
        module: Any = layer.form.module(stage, bias is not None, device=kernel.device, dtype=kernel.dtype)
        module.weight = nn.Parameter(kernel.detach().clone(), requires_grad=layer.factor_parameters()[0].requires_grad)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        modules.append(module)
    return _showing(modules, layer)


def _showing(modules: list[nn.Module], layer: TensorizedLayer) -> nn.Module:
    if len(modules) == 1:
        return modules[0].eval()
    sequence = nn.Sequential(*modules).eval()
    vars(sequence).update(layer.shown)
    return sequence


def _folds(model: nn.Module, images: Given) -> Iterator[Swap]:
    """For every batch norm that can be folded: the layer with it, and the module that replaces the norm."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    linear = [name for name, module in model.named_modules() if _can_absorb(module)]
    for name, norm_name in trace(model, linear, images.clone()).batch_norms.items():
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        rest = _without_norm(norm)
        # A module with a second name would not be replaced there.
        if rest is not None and names[id(layer)] == names[id(norm)] == 1:
            yield {name: _absorbed(cast("nn.Linear", layer), cast(BatchNorm, norm)), norm_name: rest}


def _can_absorb(module: nn.Module) -> bool:
    own = module._parameters
    return kind_of(module) in ("linear", *AXES) and is_untouched(module) and own.keys() >= {"weight", "bias"}


def _without_norm(norm: nn.Module) -> nn.Module | None:
    """What replaces a batch norm after it was folded, such as its activation; None if its class is unknown."""
    if is_exact(norm):
        return nn.Identity()
    if type(norm).__name__ == "BatchNormAct2d" and {"drop", "act"} <= set(norm._modules):  # timm's
        return nn.Sequential(norm.drop, norm.act).eval()  # type: ignore[arg-type]
    return None


def _absorbed(layer: DenseLayer, norm: BatchNorm) -> nn.Module:
    """The layer with the batch norm's scale and shift in its kernel and bias; computed in float64."""
    mean, variance = (cast(Tensor, t).double() for t in (norm.running_mean, norm.running_var))
    scale = (variance + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
    old = cast("nn.Parameter | None", layer.bias)
    bias = -mean if old is None else old.double() - mean
    shift = bias * scale + (0.0 if norm.bias is None else norm.bias.double())
    trained = layer.weight.requires_grad
    folded = copy.copy(layer)
    folded._parameters = layer._parameters.copy()
    folded.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=trained)
    kernel = kernel_of(layer).double()
    set_kernel_(folded, kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1)))
    folded.bias = nn.Parameter(shift.to(layer.weight), requires_grad=trained if old is None else old.requires_grad)
    return folded
