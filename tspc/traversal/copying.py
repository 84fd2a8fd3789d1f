"""Copies networks, also with parts that `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tspc.errors import TspcError

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module, shares_tensors: bool = False) -> Module:
    """A deep copy of `model`, in which tensors that were computed from others are constants.

    With `shares_tensors` the parameters and buffers are those of `model` itself.
    Such tensors are the weights of weight norm, spectral norm and pruning masks, until the next forward pass computes
    them again, and activations that a module keeps. Locks are replaced by new ones. Random generators continue from the
    same state. Raises TspcError if an attribute cannot be copied, such as an open file; the message names it.
    """
    try:
        return _deep_copy(model, model, [*model.parameters(), *model.buffers()] if shares_tensors else ())
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an attribute may be anything, and may raise anything
        raise TspcError(_complaint(model, error)) from error


def _deep_copy(value: Any, owner: nn.Module, shared: Iterable[Tensor] = ()) -> Any:
    memo = {id(kept): new(kept) for kept, new in _renewed(owner)} | {id(tensor): tensor for tensor in shared}
    with _Detaching():
        return copy.deepcopy(value, memo)


class _Detaching(TorchFunctionMode):
    """Copies also tensors that are not leaves of the graph, which PyTorch refuses."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _detached(tensor, memo)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _detached(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    base = tensor._base
    if not isinstance(base, nn.Parameter):
        return tensor.detach().clone()
    # A view of a parameter becomes a view of the copied parameter, so it still shows its changes.
    copied = copy.deepcopy(base, memo).detach()
    return copied.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _same_generator(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


_RENEWED: dict[type, Callable[[Any], Any]] = {
    type(threading.Lock()): lambda _: threading.Lock(),
    type(threading.RLock()): lambda _: threading.RLock(),
    threading.Condition: lambda _: threading.Condition(),
    torch.Generator: _same_generator,
}


def _renewed(model: nn.Module) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """Each object inside the modules' attributes that is made new instead of copied, and the function that makes it."""
    waiting: list[Any] = [vars(module) for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) in _RENEWED:
            yield value, _RENEWED[type(value)]
        else:
            waiting += _parts(value)


def _parts(value: Any) -> Iterator[Any]:
    """The parts of a value that a deep copy would copy, too."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif not isinstance(value, Tensor | type | types.FunctionType | types.ModuleType):
        yield getattr(value, "__dict__", {})


def _complaint(model: nn.Module, error: Exception) -> str:
    """The message of the error; it names the attribute that cannot be copied, if it is only one."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "_modules":
                continue
            try:
                _deep_copy(value, module)
            except Exception:
                where = f"{name}.{key}" if name else key
                return (
                    f"{type(model).__name__} cannot be copied because of its attribute {where} "
                    f"({type(value).__name__}: {reason}); set it to None for the time being, or give the class a "
                    "__deepcopy__"
                )
    return f"{type(model).__name__} cannot be copied: {type(error).__name__}: {reason}"
