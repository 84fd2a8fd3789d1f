"""Forward hooks that are removed again, and forward passes that end early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tspc.data.model_inputs import Given, arguments_of
from tspc.layers.unpacking import sequence_of
from tspc.system.modes import whole_operations


class Reached(Exception):
    """Raised by a hook to end the forward pass of `run_until_reached`."""


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a module's call, by position or by name; for a layer this is its input."""
    return next(iter((*args, *kwargs.values())))


@contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Removes the given hooks at the end of the `with` block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until_reached(model: nn.Module, handles: Sequence[RemovableHandle], *args: Any, **kwargs: Any) -> None:
    """Runs `model` up to the hook that raises `Reached`, or to the end if none does; then removes the hooks."""
    with hooked(handles), suppress(Reached):
        model(*args, **kwargs)


def run_on(model: nn.Module, handles: Sequence[RemovableHandle], batch: Given) -> None:
    """As `run_until_reached`, on a batch of the network's inputs."""
    args, kwargs = arguments_of(batch)
    run_until_reached(model, handles, *args, **kwargs)


def version_of(value: Any) -> int | None:
    """A number that changes with every operation in place on a tensor; None if unknown, as in inference mode."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the `with` block; then every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The outputs of the named modules in the last forward pass, by name."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(name, sequence_of(module, output))

    with hooked([model.get_submodule(name).register_forward_hook(keep(name)) for name in names]):
        yield found


@contextmanager
def running(number: int, short: bool) -> Iterator[None]:
    """The modes in which a network runs over a batch: its own random numbers, and with `short` bfloat16 on the CPU."""
    with seeded(number), torch.autocast("cpu", torch.bfloat16, enabled=short), whole_operations():
        yield


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Random numbers on the CPU that depend on the number alone; the state before is restored.

    A network may draw some in eval mode, too. The reference and the compressed network must draw the same ones for a
    batch, or their answers do not belong together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        yield
