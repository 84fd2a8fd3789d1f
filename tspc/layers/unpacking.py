"""Attention and recurrent modules hold several matrices each; here they become modules with a dense layer for each.

The new modules compute the same, and share the memory of the old parameters. What is not tensorized is put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tspc.layers.attention import Attention
from tspc.layers.forms import tensorized_layers
from tspc.layers.norms import is_untouched
from tspc.layers.recurrent import GRU, LSTM, RNN, Recurrent
from tspc.layers.replacing import CALL_HOOKS, set_modules

UNPACKED = (Attention, Recurrent)
"""The classes of modules whose matrices are layers."""
F = TypeVar("F", bound=Callable[..., Any])
_FORMS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.MultiheadAttention: Attention,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
}


@dataclass
class Originals:
    """What `unpack_` has replaced in a network: modules by name, and encoders that must not use nested tensors."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    encoders: list[nn.TransformerEncoder] = field(default_factory=list)


@contextmanager
def unpacked(model: nn.Module, only: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """Inside the `with` block the matrices of attention and recurrent modules are layers of `model`.

    At the end the modules without a tensorized layer are put back; the others stay. Modules that are unpacked already
    stay, too. `only` chooses modules by name.
    """
    originals = unpack_(model, only)
    try:
        yield
    finally:
        pack_(model, originals)


def unpack_(model: nn.Module, only: Callable[[str], bool] = lambda name: True) -> Originals:
    """Replaces modules as `unpacked` does; `pack_` takes the result."""
    can = _can_be_unpacked(model)
    old = {name: m for name, m in model.named_modules() if name and type(m) in _FORMS and can(m) and only(name)}
    new = {name: _FORMS[type(module)](module) for name, module in old.items()}
    for name, module in new.items():
        _share_hooks_(old[name], module)
    set_modules(model, new)
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor and _has(m)]
    for encoder in encoders:  # nested tensors are for PyTorch's own attention alone
        encoder.use_nested_tensor = False
    return Originals(old, encoders)


@torch.no_grad()
def pack_(model: nn.Module, originals: Originals) -> None:
    """Puts the originals back where no layer is tensorized; elsewhere the dense layers get memory of their own."""
    back: dict[str, nn.Module] = {}
    for name, old in originals.modules.items():
        module = model.get_submodule(name)
        if tensorized_layers(module):
            for parameter in module.parameters():
                if parameter.untyped_storage().nbytes() > parameter.nbytes:
                    parameter.data = parameter.data.clone()
        else:
            old.train(module.training)
            back[name] = old
    set_modules(model, back)
    for encoder in originals.encoders:
        encoder.use_nested_tensor = not _has(encoder)


def of_parts(function: F) -> F:
    """The same function of a network, its first argument, which is `unpacked` during the call."""

    @functools.wraps(function)
    def wrapped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with unpacked(model):
            return function(model, *args, **kwargs)

    return cast(F, wrapped)


def with_like_parts(function: F) -> F:
    """The same function of a network and its reference, which is unpacked meanwhile where the network is unpacked."""

    @functools.wraps(function)
    def wrapped(model: nn.Module, reference: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with unpacked(reference, _unpacked_in(model).__contains__):
            return function(model, reference, *args, **kwargs)

    return cast(F, wrapped)


def unpack_like_(model: nn.Module, other: nn.Module) -> None:
    """Unpacks the modules that are unpacked in another network of the same structure, for good."""
    unpack_(model, _unpacked_in(other).__contains__)


def _unpacked_in(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, UNPACKED)}


def parts_of(model: nn.Module) -> set[str]:
    """The names of the layers that are parts of attention and recurrent modules."""
    owners = ((name, m) for name, m in model.named_modules() if isinstance(m, UNPACKED))
    return {f"{name}.{part}" for name, owner in owners for part, _ in owner.named_children()}


def owner_in(model: nn.Module, name: str) -> nn.Module:
    """The module `name` of a network, or the module that holds its matrix where this is not unpacked."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0])


def sequence_of(module: nn.Module, output: Any) -> Any:
    """What a module passes on: of the tuples of attention and recurrent modules the first item."""
    is_known = isinstance(module, nn.MultiheadAttention | nn.RNNBase)
    return output[0] if is_known and isinstance(output, tuple) else output


def _has(model: nn.Module) -> bool:
    return any(isinstance(module, UNPACKED) for module in model.modules())


def _share_hooks_(old: nn.Module, new: nn.Module) -> None:
    for hooks in CALL_HOOKS:
        if hooks in vars(old):
            setattr(new, hooks, vars(old)[hooks])


def _can_be_unpacked(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Whether a module has ordinary parameters of its own, and is in one place of the network."""
    places: dict[int, int] = {}
    owners: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = places.get(id(module), 0) + 1
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def can(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        is_plain = all(type(p) is nn.Parameter and p.is_floating_point() and owners[id(p)] == 1 for p in parameters)
        is_own = "forward" not in vars(module) and not any(m._buffers for m in module.modules())
        return is_plain and is_own and places[id(module)] == 1 and _has_ordinary(module)

    return can


def _has_ordinary(module: nn.Module) -> bool:
    """Whether the parameters and modules inside are those that PyTorch made."""
    if isinstance(module, nn.RNNBase):
        return set(module._parameters) == {name for names in module._all_weights for name in names}
    outer = module._modules.get("out_proj")
    is_ordinary = type(outer) is NonDynamicallyQuantizableLinear and is_untouched(outer)
    known: Collection[str] = (
        "in_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        *(f"{x}_proj_weight" for x in "qkv"),
    )
    is_plain = isinstance(outer, nn.Linear) and set(outer._parameters) == {"weight", "bias"}
    return is_ordinary and is_plain and len(module._modules) == 1 and set(module._parameters) <= set(known)
