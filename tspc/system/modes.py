"""Switches off the modes of PyTorch that the user has switched on, while tspc computes.

The default dtype and the default device are not changed, because the user's network may depend on them. tspc gives its
own tensors an explicit dtype and device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices whose autocast is switched off."""
OPERATIONS = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")]
"""The settings that can round float32 to fewer digits."""


@contextmanager
def own_modes(exact: bool = True) -> Iterator[None]:
    """Inside this context PyTorch has its default modes, whatever the caller has set. Also a decorator.

    Autocast and inference mode are off, gradients are possible, and an operation without a deterministic form warns
    instead of raising. With `exact`, no product of float32 numbers is rounded to TF32 or bfloat16.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_TOLERANT)
        if exact:
            stack.enter_context(_EXACT)
        yield


@contextmanager
def whole_operations() -> Iterator[None]:
    """Turns off the fast path of PyTorch's encoders: one operation, which calls no layer and packs padded texts."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def is_of_inference(model: nn.Module) -> bool:
    """Whether a network was made in inference mode; its tensors have no gradients and cannot be changed outside it."""
    return any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


class _Shared:
    """A change to settings of the whole process: the first thread that needs it makes it, the last one undoes it."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change, self._lock, self._users = change, threading.Lock(), 0
        self._undo: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._undo = self._change()
            self._users += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo()


def _tolerate() -> Callable[[], None]:
    if not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled():
        return lambda: None
    torch.use_deterministic_algorithms(True, warn_only=True)
    return lambda: torch.use_deterministic_algorithms(True)


def _compute_exactly() -> Callable[[], None]:
    """Sets the newer switches, one for every operation, and the older ones, because other code reads them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (lambda: matmul.allow_tf32, lambda value: setattr(matmul, "allow_tf32", value), False),
        (lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value), False),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    ]
    fine, coarse = _fine_precisions(), []
    for read, write, exact in switches:
        with suppress(RuntimeError):  # an older switch cannot be read where the newer ones say what it cannot
            coarse.append((write, read(), exact))
    for write, _, exact in coarse:
        write(exact)
    _set_fine_precisions(dict.fromkeys(fine, "ieee"))

    def undo() -> None:
        for write, before, _ in coarse:
            write(before)
        _set_fine_precisions(fine)

    return undo


def _fine_precisions() -> dict[tuple[str, str], str]:
    """The precision of every operation; empty if this PyTorch is too old to have such switches."""
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    return {} if get is None else {operation: get(*operation) for operation in OPERATIONS}


def _set_fine_precisions(precisions: dict[tuple[str, str], str]) -> None:
    for operation, precision in precisions.items():
        torch._C._set_fp32_precision_setter(*operation, precision)


_TOLERANT, _EXACT = _Shared(_tolerate), _Shared(_compute_exactly)
