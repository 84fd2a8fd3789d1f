"""Biases and norms of a network whose factors lie on grids: 16 bits for a number, and no statistics.

In eval mode a batch norm is a scale and a shift for each channel. Of a small network its four vectors in float32 would
be a third of the bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tspc.calibration.recalibration import BatchNorm
from tspc.decompositions import double
from tspc.errors import WeightsError
from tspc.quantization.grids import VECTOR_BYTES
from tspc.store.state import tensor_state

ENTRY = "vectors"
"""The name of the entry of a file that holds all narrow vectors, one after the other."""
LOST = 1e-3
"""The largest error of a narrow vector, relative to its largest entry; rounding to float16 causes half of it."""


@torch.no_grad()
def narrow_vectors_(model: nn.Module) -> None:
    """Rounds the vectors of `model` to float16 numbers, and moves the statistics of batch norms into scale and shift.

    The running mean becomes 0 and the running variance 1; the answers in eval mode stay the same up to rounding.
    Vectors that float16 cannot hold are left alone. All keep their dtype.
    """
    for norm in _norms(model).values():
        scale, shift = _affine(norm)
        if _fits(scale) and _fits(shift):
            norm.weight.copy_(_rounded(scale))
            norm.bias.copy_(_rounded(shift))
            norm.reset_running_stats()
    for parameter in model.parameters():
        if _is_vector(parameter) and _fits(parameter):
            parameter.copy_(_rounded(parameter))


def bytes_saved(model: nn.Module, layers: Collection[str]) -> int:
    """The bytes of a file that `narrow_vectors_` saves, without the vectors of the named layers."""
    state = tensor_state(model)
    left_out = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    saved = 0
    for name, norm in _norms(model).items():
        if all(map(_fits, _affine(norm))):
            left_out |= {f"{name}.{kind}" for kind in ("weight", "bias")}
            saved += sum(_bytes(state[key]) for key in _statistics(name) if key in state)
            saved += 2 * norm.num_features * (norm.weight.element_size() - VECTOR_BYTES)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    vectors = (x for name, x in state.items() if name in parameters - left_out and _is_vector(x) and _fits(x))
    return saved + sum(_bytes(x) - VECTOR_BYTES * x.numel() for x in vectors)


def state_saved(model: nn.Module) -> int:
    """The bytes that `with_vectors` saves."""
    names, norms = _narrow(model)
    state = tensor_state(model)
    dropped = sum(_bytes(state[key]) for norm in norms for key in _statistics(norm) if key in state)
    return dropped + sum(_bytes(state[name]) - VECTOR_BYTES * state[name].numel() for name in names)


def with_vectors(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The tensors of a file, in which one entry holds all narrow vectors, and what its header says of them.

    Nothing is lost: a vector is narrow if float16 holds it exactly. Statistics of 0 and 1 are left out.
    """
    names, norms = _narrow(model)
    dropped = {*names, *(key for norm in norms for key in _statistics(norm))}
    found = {name: value for name, value in tensors.items() if name not in dropped}
    if names:
        found[ENTRY] = torch.cat([tensors[name].to(torch.float16) for name in names])
    return found, {key: said for key, said in (("vectors", names), ("norms", norms)) if said}


def without_vectors(
    tensors: Mapping[str, Tensor], model: nn.Module, header: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """The inverse of `with_vectors`; `model` has the sizes. Raises WeightsError if the entry is missing or damaged."""
    names, norms = header.get("vectors", []), header.get("norms", [])
    if not names and not norms:
        return dict(tensors)
    found, own = dict(tensors), tensor_state(model)
    data = found.pop(ENTRY, None) if names else torch.empty(0, dtype=torch.float16)
    sizes = [own[name].numel() if name in own and own[name].ndim == 1 else -1 for name in names]
    modules = _norms(model)
    if data is None or data.dtype != torch.float16 or data.ndim != 1 or min(sizes, default=0) < 0:
        raise WeightsError(_DAMAGED)
    if sum(sizes) != len(data) or not set(norms) <= set(modules):
        raise WeightsError(_DAMAGED)
    found |= {name: part.float() for name, part in zip(names, data.split(sizes), strict=True)}
    for name in norms:
        mean, variance, count = _statistics(name)
        size = modules[name].num_features
        found |= {mean: torch.zeros(size), variance: torch.ones(size), count: torch.tensor(0)}
    return found


_DAMAGED = (
    "the biases and norms are missing, damaged, or not those of this network; fetch the file again, or make it again"
)


def _norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Batch norms in float32 with a scale, a shift and statistics."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    return {
        name: m
        for name, m in norms.items()
        if m.affine and m.running_mean is not None and m.weight.dtype == m.running_mean.dtype == torch.float32
    }


def _affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The weight and the bias that the batch norm would have with the statistics 0 and 1."""
    mean, variance = (double(cast(Tensor, x)) for x in (norm.running_mean, norm.running_var))
    scale = double(norm.weight) / (variance + norm.eps).sqrt()
    return (scale * (1 + norm.eps) ** 0.5).float(), (double(norm.bias) - scale * mean).float()


def _narrow(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the vectors in the state that float16 holds exactly, and of batch norms with statistics 0 and 1."""
    norms = [name for name, norm in _norms(model).items() if _has_no_statistics(norm)]
    dropped = {key for norm in norms for key in _statistics(norm)}
    state = tensor_state(model).items()
    names = [name for name, x in state if name not in dropped and _is_vector(x) and torch.equal(_rounded(x), x)]
    return names, norms


def _has_no_statistics(norm: BatchNorm) -> bool:
    mean, variance, count = (cast(Tensor, x) for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked))
    return not mean.is_meta and not bool(mean.any()) and bool((variance == 1).all()) and not bool(count)


def _statistics(norm: str) -> Iterator[str]:
    return (f"{norm}.{key}" for key in ("running_mean", "running_var", "num_batches_tracked"))


def _is_vector(x: Tensor) -> bool:
    return x.ndim == 1 and x.dtype == torch.float32 and x.layout == torch.strided and not x.is_meta


def _fits(x: Tensor) -> bool:
    """Whether rounding to float16 changes a vector little."""
    x = x.detach()
    return bool(((_rounded(x) - x).abs() <= LOST * x.abs().amax()).all()) if x.numel() else True


def _rounded(x: Tensor) -> Tensor:
    return x.detach().to(torch.float16).to(x.dtype)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
