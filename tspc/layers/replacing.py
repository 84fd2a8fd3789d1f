"""Replaces a layer in a network; its hooks stay, and so do the attributes that the network reads."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from tspc.errors import TspcError, TspcWarning

CALL_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


_PYTORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has; what a network keeps besides may be anywhere else."""
_HOLDERS = frozenset((list, dict, tuple))
_DEPTH = 5
"""How deep lists in lists may be that know a layer; one may hold itself."""


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name`; see `set_modules`."""
    set_modules(model, {name: module})


def set_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules at dotted names, and also into the lists, tuples and dicts in which modules hold the old ones.

    Otherwise a forward pass over a plain list of layers would still run the old modules.
    """
    old = {name: model.get_submodule(name) for name in modules}
    new: dict[int, nn.Module] = {}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
        new.setdefault(id(old[name]), module)
    for owner in model.modules():
        for key, child in owner._modules.items():  # in more places than one
            owner._modules[key] = child if child is None else new.get(id(child), child)
        own = vars(owner)
        for key in own.keys() - _PYTORCH:
            value = _exchanged(own[key], new, _DEPTH)
            if value is not own[key]:
                own[key] = value


def _exchanged(value: Any, new: Mapping[int, nn.Module], depth: int) -> Any:
    """`value` with new modules instead of old ones, which are known by their identity; lists are changed in place."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if type(value) not in _HOLDERS or depth == 0:
        return value
    items = list(value.values() if isinstance(value, dict) else value)
    if not any(isinstance(item, nn.Module) or type(item) in _HOLDERS for item in items):  # most hold numbers
        return value
    changed = [_exchanged(item, new, depth - 1) for item in items]
    if all(one is other for one, other in zip(changed, items, strict=True)):
        return value
    if isinstance(value, tuple):
        return tuple(changed)
    if isinstance(value, dict):
        value.update(zip(value, changed, strict=True))
    else:
        value[:] = changed
    return value


def replace_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name`; see `replace_layers`."""
    replace_layers(model, {name: module})


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts layers at dotted names, and gives each the forward and backward hooks of the old layer.

    The handles of these hooks still work.
    """
    for name, module in layers.items():
        old = vars(model.get_submodule(name))
        for hooks in CALL_HOOKS:
            if hooks in old:
                setattr(module, hooks, old[hooks])
    set_modules(model, layers)


def _has_hooks(tensor: nn.Parameter | None) -> bool:
    return tensor is not None and bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)  # pyright: ignore


def warn_of_state_hooks(layers: Mapping[str, nn.Module]) -> None:
    """Warns of hooks that act on the state dict of the named dense layers; their replacements do not get these hooks.

    The entries of the state dict have other names in a tensorized layer.
    """
    found = [name for name, layer in layers.items() if any(vars(layer).get(hooks) for hooks in STATE_HOOKS)]
    if found:
        warnings.warn(
            f"hooks on the state dict of {', '.join(found)} do not act on the compressed layers, because the weights "
            "have other names there; register such hooks again if you need them",
            TspcWarning,
            stacklevel=2,
        )


def warn_of_parameter_hooks(layers: Mapping[str, nn.Module]) -> None:
    """Warns of hooks on the parameters of the named dense layers; a copy does not have them, nor do the factors."""
    hooked = [name for name, layer in layers.items() if any(map(_has_hooks, layer._parameters.values()))]
    if hooked:
        warnings.warn(
            f"hooks on the parameters of {', '.join(hooked)} do not act on the factors of the compressed layers; "
            "register such hooks again if you need them",
            TspcWarning,
            stacklevel=2,
        )


def saves_pretrained(model: nn.Module) -> list[nn.Module]:
    """The modules of a network that have `save_pretrained`, such as networks of transformers."""
    return [module for module in model.modules() if hasattr(type(module), "save_pretrained")]


def forbid_save_pretrained_(module: nn.Module) -> None:
    module.save_pretrained = functools.partial(_refuse, type(module).__name__)  # type: ignore[assignment]


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise TspcError(
        f"save_pretrained cannot save this {name}: its layers were replaced, and from_pretrained would make them dense "
        'and random; use tspc.save(model, "small.safetensors"), and tspc.load("small.safetensors", model=dense) with '
        f"a {name} as it was before, such as {name}(config)"
    )
