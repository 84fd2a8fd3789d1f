"""What a network holds beside factors on grids: 16 bits for a number, 8 bits for a statistic of a batch norm.

These are biases, norms, and the parameters of modules that are not tensorized, such as an LSTM. Of a small network the
four vectors of a batch norm in float32 would be a third of the bytes. In eval mode it is a scale and a shift for each
channel, so its statistics may be rounded much: weight and bias make up for it. They still serve further training, which
would have to find them anew if they were left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.recalibration import BatchNorm
from tspc.decompositions import double
from tspc.errors import WeightsError
from tspc.layers.dense import kernel_of, kind_of
from tspc.layers.forms import tensorized_layers
from tspc.layers.norms import is_exact
from tspc.quantization.grids import VECTOR_BYTES
from tspc.store.state import tensor_state

ENTRY, STATISTICS = ".vectors", ".statistics"
"""The names of the entries of a file that hold all float16 numbers, and all narrow statistics, one after the other. No
entry of a network's state begins with a dot."""
DEVIATION, RATIO = torch.float8_e5m2, torch.float8_e4m3fn
"""The formats of a standard deviation, and of a mean divided by it. All products of such numbers are exact."""
NARROW = 8 * VECTOR_BYTES
"""The width of numbers beside factors on grids."""
LOST = 1e-3
"""The largest error of a tensor in float16, relative to its largest entry; rounding causes half of it."""


@torch.no_grad()
def narrow_beside_(model: nn.Module, kept: Collection[str] = ()) -> None:
    """Rounds the parameters of `model` to float16 numbers, and the statistics of its batch norms to fewer bits.

    The batch norms' weights and biases change with their statistics, so that the answers in eval mode stay the same up
    to rounding to float16. Left alone are factors on grids, the parameters named in `kept`, those that float16 cannot
    hold, those of convolutions and dense layers of a known kind whose kernels are not on grids, and batch norms that
    share a tensor with another module or do more than an affine map. All keep their dtype.
    """
    named = {id(x) for name, x in _parameters(model) if name in kept}
    left_alone = _left_alone(model) | named
    for norm in _norms(model).values():
        narrow = None if named & {id(norm.weight), id(norm.bias)} else _narrowed(norm)
        if narrow is not None:
            for own, value in zip((norm.weight, norm.bias, norm.running_mean, norm.running_var), narrow, strict=True):
                cast(Tensor, own).copy_(value)
            cast(Tensor, norm.num_batches_tracked).zero_()
    biases = {id(layer.bias): layer for layer in tensorized_layers(model).values() if layer.grids}
    for parameter in model.parameters():
        if not _is_float32(parameter) or id(parameter) in left_alone:
            continue
        if _fits(parameter) or (id(parameter) in biases and _bias_fits(biases[id(parameter)])):
            parameter.copy_(_rounded(parameter))


def wide_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that float16 does not hold exactly. Of a trained network these are all."""
    return {name for name, x in _parameters(model) if not _is_narrow(x)}


def _left_alone(model: nn.Module) -> set[int]:
    """By identity: factors on grids, and the parameters of layers of a known kind with floating-point kernels."""
    tensorized = tensorized_layers(model).values()
    links = {id(module) for layer in tensorized for module in layer.modules()}
    layers: list[nn.Module] = [layer for layer in tensorized if not layer.grids]
    layers += [module for module in model.modules() if kind_of(module) is not None and id(module) not in links]
    factors = {id(factor) for layer in tensorized for factor in layer.factor_parameters()}
    return factors | {id(parameter) for layer in layers for parameter in layer.parameters()}


def has_narrow_bias(layer: nn.Module) -> bool:
    """Whether float16 can hold the bias of a convolution or dense layer, if it has one."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor) or bias.element_size() == VECTOR_BYTES:
        return True
    return _is_float32(bias) and (_fits(bias) or (kind_of(layer) is not None and _bias_fits(layer)))


def _bias_fits(layer: nn.Module) -> bool:
    """Whether rounding the bias to float16 changes the outputs for inputs of about 1 little.

    For very small numbers its steps are large. Compensation gives such numbers to a bias of zeros.
    """
    bias, weight = (cast(Tensor, x) for x in (layer.bias, layer.weight))
    if not weight.is_floating_point() or weight.layout != torch.strided or weight.is_meta:
        return weight.is_meta
    return _fits(bias, float(kernel_of(layer).detach().flatten(1).norm(dim=1).amax()))


def is_narrow_whole(layer: nn.Module) -> bool:
    """Whether float16 can hold all parameters of a layer of a kind that is not known."""
    return kind_of(layer) is None and all(_is_float32(x) and _fits(x) for x in layer.parameters(recurse=False))


def bytes_saved(model: nn.Module, layers: Collection[nn.Module], kept: Collection[str] = ()) -> int:
    """The bytes of a file that `narrow_beside_` saves, without those of the `layers` themselves.

    The parameters named in `kept` keep their numbers. Of them those are narrow that float16 holds exactly.
    """
    state, saved = tensor_state(model), 0
    exact = {id(x) for name, x in _parameters(model) if name in kept}
    done = {id(x) for layer in layers for x in layer.parameters(recurse=False)} - exact
    for name, norm in _norms(model).items():
        if not (done | exact) & {id(norm.weight), id(norm.bias)} and _narrowed(norm) is not None:
            saved += _saved_by_statistics(name, norm, state) + _saved(norm.weight) + _saved(norm.bias)
            done |= {id(norm.weight), id(norm.bias)}
    # A shared parameter is in a file under the first of its names.
    beside = (x for name, x in model.named_parameters() if name in state and id(x) not in done and _is_float32(x))
    return saved + sum(_saved(x) for x in beside if (_is_narrow(x) if id(x) in exact else _fits(x)))


def state_saved(model: nn.Module) -> int:
    """The bytes that `with_narrow` saves."""
    state = tensor_state(model)
    names, norms = _narrow(model)
    of_statistics = sum(_saved_by_statistics(name, norm, state) for name, norm in norms.items())
    return of_statistics + sum(_saved(state[name]) for name in names)


def _saved_by_statistics(name: str, norm: BatchNorm, state: Mapping[str, Tensor]) -> int:
    return sum(_bytes(state[key]) for key in _statistics(name) if key in state) - 2 * norm.num_features


def _saved(x: Tensor) -> int:
    return _bytes(x) - VECTOR_BYTES * x.numel()


def with_narrow(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The tensors of a file, in which one entry holds all narrow parameters and one all narrow statistics.

    Also returns what the file's header says of them. Nothing is lost: a parameter is narrow if float16 holds it
    exactly, and statistics if they are as `narrow_beside_` makes them.
    """
    names, norms = _narrow(model)
    dropped = {*names, *(key for norm in norms for key in _statistics(norm))}
    found = {name: value for name, value in tensors.items() if name not in dropped}
    if names:
        found[ENTRY] = torch.cat([tensors[name].to(torch.float16).flatten() for name in names])
    if norms:
        codes = (code for norm in norms.values() for code in _codes(norm))
        found[STATISTICS] = torch.cat([code.cpu().view(torch.uint8) for code in codes])
    shapes = [list(tensors[name].shape) for name in names]
    header = {"vectors": names, "shapes": shapes, "norms": list(norms)}
    return found, {key: said for key, said in header.items() if said}


def without_narrow(tensors: Mapping[str, Tensor], model: nn.Module, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `with_narrow`; `model` has the sizes of the norms. Raises WeightsError for damaged entries.

    A file of an earlier version has no shapes; its numbers are vectors, of the sizes that `model` has.
    """
    names, norms, own = header.get("vectors", []), header.get("norms", []), tensor_state(model)
    if not names and not norms:
        return dict(tensors)
    shapes = header.get("shapes", [own[name].shape if name in own and own[name].ndim == 1 else [-1] for name in names])
    found, modules = dict(tensors), _all_norms(model)
    sizes = list(map(math.prod, shapes)) if len(shapes) == len(names) else [-1]
    features = [modules[name].num_features if name in modules else -1 for name in norms for _ in range(2)]
    numbers = _parts(found.pop(ENTRY, None), torch.float16, sizes)
    codes = _parts(found.pop(STATISTICS, None), torch.uint8, features)
    found |= {name: x.float().reshape(shape) for name, shape, x in zip(names, shapes, numbers, strict=True)}
    for name, deviation, ratio in zip(norms, codes[::2], codes[1::2], strict=True):
        mean, variance, count = _statistics(name)
        wide = _decoded(deviation.clone().view(DEVIATION), ratio.clone().view(RATIO))
        if not all(bool(value.isfinite().all()) for value in wide):
            raise WeightsError(_DAMAGED)
        found |= {mean: wide[0], variance: wide[1], count: torch.tensor(0)}
    return found


def _parts(data: Tensor | None, dtype: torch.dtype, sizes: list[int]) -> tuple[Tensor, ...]:
    """The parts of an entry. Raises WeightsError if it is not of this dtype and of these sizes together."""
    data = torch.empty(0, dtype=dtype) if data is None else data
    if data.dtype != dtype or data.ndim != 1 or min(sizes, default=0) < 0 or sum(sizes) != len(data):
        raise WeightsError(_DAMAGED)
    return data.split(sizes) if sizes else ()


_DAMAGED = (
    "the float16 numbers or the statistics of norms are missing, damaged, or not those of this network; give load the "
    "architecture that was compressed, or fetch the file again"
)


def _norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Batch norms in float32 whose statistics may be rounded: weight and bias, all their own, make up for that.

    Without a momentum the statistics are the mean of all batches so far, and their number could not be rounded.
    """
    owners = Counter(id(x) for m in model.modules() for x in (*m._parameters.values(), *m._buffers.values()))

    def is_own(norm: BatchNorm) -> bool:
        tensors = _tensors(norm)
        return all(x.dtype == torch.float32 and owners[id(x)] == 1 for x in tensors)

    norms = _all_norms(model).items()
    return {name: norm for name, norm in norms if is_exact(norm) and norm.momentum is not None and is_own(norm)}


def _all_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Batch norms with a scale, a shift and statistics."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    return {n: m for n, m in norms.items() if None not in (*_tensors(m), m.num_batches_tracked)}


def _tensors(norm: BatchNorm) -> list[Any]:
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def _narrowed(norm: BatchNorm) -> tuple[Tensor, ...] | None:
    """Weight, bias, mean and variance in few bits that give the same answers; None if float16 cannot hold the first."""
    mean, variance = (double(cast(Tensor, x)) for x in (norm.running_mean, norm.running_var))
    new_mean, new_variance = _decoded(*_codes(norm))
    scale = double(norm.weight) / (variance + norm.eps).sqrt()
    spread = (double(new_variance) + norm.eps).sqrt()
    weight = (scale * spread).float()
    # The rounded scale is exact where it matters most, at the mean.
    bias = double(norm.bias) + double(_rounded(weight)) / spread * (double(new_mean) - mean)
    # If the mean is large beside the deviation, the new bias is, too, and its rounding would change the output much.
    size = double(norm.bias).abs() + double(norm.weight).abs()
    error = (double(_rounded(bias.float())) - bias).abs()
    is_small = mean.is_meta or bool((error <= LOST * (size + 0.01 * size.amax())).all())
    if not (is_small and _fits(weight)):
        return None
    return _rounded(weight), _rounded(bias.float()), new_mean, new_variance


def _codes(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The standard deviation, and the mean divided by it, in 8 bits each."""
    mean, variance = (cast(Tensor, x).detach() for x in (norm.running_mean, norm.running_var))
    least, most = torch.finfo(DEVIATION).smallest_normal, torch.finfo(DEVIATION).max
    deviation = variance.sqrt().nan_to_num(least).clamp(least, most).to(DEVIATION)
    limit = torch.finfo(RATIO).max
    return deviation, (mean / deviation.float()).nan_to_num(0.0).clamp(-limit, limit).to(RATIO)


def _decoded(deviation: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance."""
    return deviation.float() * ratio.float(), deviation.float().square()


def _narrow(model: nn.Module) -> tuple[list[str], dict[str, BatchNorm]]:
    """The names of the parameters that float16 holds exactly, and the batch norms with narrow statistics."""
    norms = {name: norm for name, norm in _norms(model).items() if _has_few_bits(norm)}
    factors = {id(x) for layer in tensorized_layers(model).values() for x in layer.factor_parameters()}
    state = tensor_state(model)
    beside = ((name, x) for name, x in model.named_parameters() if name in state and id(x) not in factors)
    return [name for name, x in beside if _is_narrow(x)], norms


def _has_few_bits(norm: BatchNorm) -> bool:
    """Whether 8 bits hold the statistics exactly."""
    own = norm.running_mean, norm.running_var
    if bool(cast(Tensor, norm.num_batches_tracked)):
        return False
    return all(torch.equal(value, cast(Tensor, x)) for value, x in zip(_decoded(*_codes(norm)), own, strict=True))


def _statistics(norm: str) -> Iterator[str]:
    return (f"{norm}.{key}" for key in ("running_mean", "running_var", "num_batches_tracked"))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters with their names in the network's state; a shared one has several."""
    return model.named_parameters(remove_duplicate=False)


def _is_float32(x: Tensor) -> bool:
    """Whether a tensor has numbers that may become narrow; a single number is not worth it."""
    return x.ndim > 0 and x.numel() > 0 and x.dtype == torch.float32 and x.layout == torch.strided


def _is_narrow(x: Tensor) -> bool:
    """Whether float16 holds a tensor exactly."""
    return _is_float32(x) and not x.is_meta and torch.equal(_rounded(x), x)


def _fits(x: Tensor, size: float = 0.0) -> bool:
    """Whether rounding to float16 changes a tensor little, beside its largest entry or this size; on meta it may."""
    x = x.detach()
    if x.is_meta or not x.numel():
        return True
    return bool(((_rounded(x) - x).abs() <= LOST * x.abs().amax().clamp_min(size)).all())


def _rounded(x: Tensor) -> Tensor:
    return x.detach().to(torch.float16).to(x.dtype)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
