"""Moves a network to a device, and finds the memory layout that it works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tspc.data import Given, answer_of, called, first_of
from tspc.traversal.hooks import evaluating
from tspc.traversal.layouts import alike


def place(model: nn.Module, device: torch.device, layout: torch.memory_format = torch.channels_last) -> nn.Module:
    """Moves the network to the device, and the kernels of its convolutions into `layout`.

    Channels last is the faster one, on CPU and GPU.
    """
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=layout)  # type: ignore[call-overload]
    return model


@dataclass(frozen=True)
class Trial:
    """The result of a network on some images: its answer or an error, the layout, and what is wrong with the other."""

    layout: torch.memory_format
    answer: Any
    error: Exception | None
    reason: str = ""


def tried(model: nn.Module, images: Given, trains: bool) -> Trial:
    """Runs `model` on images (N, C, H, W) with channels last, and with contiguous images if only that works.

    A network may call `view` on the output of a convolution, which fails with channels last. It is tried in eval mode;
    if it `trains`, also with a forward and backward step in training mode. The network is not changed.
    """
    plain, fast = (_answer(model, images, layout) for layout in (torch.contiguous_format, torch.channels_last))
    reason = _why_not(fast, plain)
    if trains and not reason and plain.error is None:
        failure = _failure(model, images, torch.channels_last)
        if failure is not None and _failure(model, images, torch.contiguous_format) is None:
            reason = _text(failure)
    if not reason:
        return fast
    return Trial(plain.layout, plain.answer, None, reason)


def _why_not(fast: Trial, plain: Trial) -> str:
    """What is wrong with channels last; empty if nothing is, or if the same is wrong with contiguous images."""
    if plain.error is not None:
        return ""
    if fast.error is not None:
        return _text(fast.error)
    return "" if alike(fast.answer, plain.answer) else "its answers differ"


def _text(error: Exception) -> str:
    return f"it fails ({' '.join(str(error).split()) or type(error).__name__})"


def _answer(model: nn.Module, images: Given, layout: torch.memory_format) -> Trial:
    place(model, first_of(images).device, layout)
    # Both layouts draw the same random numbers, and later code draws as if nothing had been tried.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
        torch.manual_seed(0)
        try:
            return Trial(layout, called(model, images.contiguous(memory_format=layout)), None)
        except Exception as error:  # the network may be the user's own
            return Trial(layout, None, error)


def _failure(model: nn.Module, images: Given, layout: torch.memory_format) -> Exception | None:
    """The error of a forward and backward step in training mode; None if it works."""
    place(model, first_of(images).device, layout)
    with torch.random.fork_rng(devices=[]), evaluating(model), _buffers_kept(model), torch.enable_grad():
        model.train()
        try:
            answer = called(model, images.contiguous(memory_format=layout))
            found = answer_of(answer)
            if found is not None and found.requires_grad:
                found.sum().backward()
        except Exception as error:  # as above
            return error
        finally:
            model.zero_grad(set_to_none=True)
    return None


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restores the buffers, such as statistics, that a training step changes."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
