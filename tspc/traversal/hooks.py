"""Forward hooks that are taken off again, and forward passes that end early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Reached(Exception):
    """Raised by a hook to end the forward pass of `run_until_reached`."""


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a hook's module was given, by position or by name: of a layer, its input."""
    return next(iter((*args, *kwargs.values())))


@contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that are registered already, until the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until_reached(model: nn.Module, handles: Sequence[RemovableHandle], *args: Any, **kwargs: Any) -> None:
    """Runs `model` up to the hook that raises `Reached`, or to the end if none does; then removes the hooks."""
    with hooked(handles), suppress(Reached):
        model(*args, **kwargs)


def version_of(value: Any) -> int | None:
    """What changes with every operation in place on a tensor; None where that is not told, as in inference mode."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode inside, in the modes that the modules had after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """By name, what some modules answered in the last forward pass."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(name, output)

    with hooked([model.get_submodule(name).register_forward_hook(keep(name)) for name in names]):
        yield found
