"""Finds out, in one forward pass, how a network runs: its segments, and what its layers are called with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tspc.data.model_inputs import Given, called
from tspc.layers.norms import along_channels, has_statistics, is_untouched, takes_shift
from tspc.system.modes import whole_operations
from tspc.traversal.blocks import block_of, find_blocks
from tspc.traversal.handing import Handed, NextCall
from tspc.traversal.hooks import first_argument, hooked, version_of
from tspc.traversal.leaps import can_leap
from tspc.traversal.nested import tensors_in


@dataclass(frozen=True)
class Segment:
    """A module that is called once in a forward pass, and the layers inside it in the order of their calls.

    `module` is "" for the whole network. `call` makes the arguments of the module from the call of the segment before
    it; None if they come from elsewhere in the network. They may then come from the output of the segment before, by
    code that runs if the network runs from its start; `skipped` are the blocks that need not run for that, the last of
    them the one before. It is empty if that is not so.
    """

    module: str
    layers: tuple[str, ...]
    call: NextCall | None = None
    skipped: tuple[str, ...] = ()

    @property
    def follows(self) -> bool:
        """Whether the arguments can be found from the segment before, without the segments before that."""
        return self.call is not None or bool(self.skipped)


@dataclass(frozen=True)
class Trace:
    """The result of one traced forward pass: the segments, the number of calls of each layer, and its batch norm.

    `same_input` gives for each layer the first layer that is called with the same tensor, which may be itself.
    `batch_norms` has an entry for a layer if its output goes only into a batch norm over its channels. The norm's
    running mean can then undo a constant that is added to the output.
    """

    segments: tuple[Segment, ...]
    calls: dict[str, int]
    batch_norms: dict[str, str]
    same_input: dict[str, str]

    def sharing(self, name: str) -> list[str]:
        """The layers that are called with the same tensor as this one, itself among them."""
        return [other for other, first in self.same_input.items() if first == self.same_input[name]]


class _Consumers(TorchFunctionMode):
    """Counts the operations that take one of the watched tensors and return tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, tuple[str, Tensor]] = {}
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(True for _ in tensors_in(result)):
            self.count((args, kwargs))
        return result

    def count(self, taken: Any) -> None:
        """Counts a use of the watched tensors in `taken`."""
        for tensor in tensors_in(taken):
            name, kept = self.watched.get(id(tensor), ("", None))
            if kept is tensor:
                self.counts[name] = self.counts.get(name, 0) + 1


@dataclass
class _Record:
    """Data that the hooks collect during a traced pass."""

    order: list[str] = field(default_factory=list)
    given: dict[str, tuple[Tensor, int | None]] = field(default_factory=dict)
    entered: dict[str, list[NextCall | None]] = field(default_factory=dict)
    before: Handed = field(default_factory=Handed)
    normalised: list[tuple[str, Tensor]] = field(default_factory=list)


@torch.no_grad()
def trace(
    model: nn.Module,
    layers: Collection[str],
    images: Given,
    blocks: list[str] | None = None,
    others: Sequence[Given] = (),
) -> Trace:
    """Runs `model` on a few images and finds its segments: the named blocks, or the blocks that hold the layers.

    `others` are inputs of other kinds that will come, such as longer texts, or texts with padding.
    """
    blocks = find_blocks(model, layers) if blocks is None else blocks
    record, consumers = _Record(), _Consumers()

    def on_layer(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            record.order.append(name)
            given = first_argument(args, kwargs)
            record.given[name] = given, version_of(given)
            consumers.watched[id(output)] = name, output

        return hook

    def on_batch_norm(name: str) -> Callable:
        return lambda module, *given: record.normalised.append((name, first_argument(*given)))

    modules = dict(model.named_modules())
    statistics = {name: m for name, m in modules.items() if has_statistics(m) and is_untouched(m)}
    handles = [modules[name].register_forward_hook(on_layer(name), prepend=True, with_kwargs=True) for name in layers]
    handles += _around_blocks(model, blocks, record)
    handles += [
        norm.register_forward_pre_hook(on_batch_norm(name), with_kwargs=True) for name, norm in statistics.items()
    ]
    with hooked(handles), consumers, whole_operations():
        answer = called(model, images)
    consumers.count(answer)
    _forget_variables_(record, model, blocks, [images[:1] if len(images) > 1 else None, *others])
    calls = {name: record.order.count(name) for name in layers}
    norms = [norm for norm, _ in record.normalised]
    batch_norms = {
        name: norm
        for name, output in consumers.watched.values()
        for norm, normalised in record.normalised
        if normalised is output and consumers.counts.get(name) == calls[name] == norms.count(norm) == 1
        if along_channels(modules[name], statistics[norm], output) and takes_shift(statistics[norm], output)
    }
    segments = _with_leaps(_segments(blocks, record), model, images)
    return Trace(segments, calls, batch_norms, _same_inputs(record, calls))


def _same_inputs(record: _Record, calls: Mapping[str, int]) -> dict[str, str]:
    """For each layer the first one with the same input; itself if it is called again, or a version is unknown."""
    firsts: dict[tuple[int, int], str] = {}
    found = {name: name for name in record.given}
    for name, (tensor, version) in record.given.items():
        if version is not None and calls[name] == 1:
            found[name] = firsts.setdefault((id(tensor), version), name)
    return found


def _around_blocks(model: nn.Module, blocks: list[str], record: _Record) -> list[RemovableHandle]:
    """Hooks that record how the arguments of each block follow from the block before it."""

    def on_entering(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            record.entered.setdefault(name, []).append(record.before.next_call((args, kwargs)))
            record.before = Handed.to((args, kwargs))

        return hook

    def on_leaving(module: nn.Module, args: Any, output: Any) -> None:
        record.before.back(output)

    handles = [model.get_submodule(n).register_forward_pre_hook(on_entering(n), with_kwargs=True) for n in blocks]
    return [*handles, *(model.get_submodule(name).register_forward_hook(on_leaving) for name in blocks)]


def _forget_variables_(record: _Record, model: nn.Module, blocks: list[str], others: Sequence[Given | None]) -> None:
    """A block follows no other one if its further arguments depend on the images, or cannot be compared."""
    if not any(call is not None and not call.is_plain for calls in record.entered.values() for call in calls):
        return
    for inputs in others:
        other = _Record()
        if inputs is not None:
            with hooked(_around_blocks(model, blocks, other)), whole_operations():
                called(model, inputs)
        for name, calls in record.entered.items():
            if calls != other.entered.get(name, []):
                record.entered[name] = [None for _ in calls]


def _segments(blocks: list[str], record: _Record) -> tuple[Segment, ...]:
    called = list(dict.fromkeys(record.order))
    if any(len(calls) != 1 for calls in record.entered.values()):
        return (Segment("", tuple(called)),)
    return tuple(
        Segment(name, tuple(layer for layer in called if block_of(layer, [name]) is not None), call)
        for name, (call,) in record.entered.items()
    )


def _with_leaps(segments: tuple[Segment, ...], model: nn.Module, images: Given) -> tuple[Segment, ...]:
    """The segments, with the blocks that need not run before those whose call is not known."""
    found, together = [], list[str]()
    for segment in segments:
        if segment.call is None:
            leaps = can_leap(model, together, segment.module, images)
            found.append(replace(segment, skipped=tuple(together) if leaps else ()))
            together = []
        else:
            found.append(segment)
        together.append(segment.module)
    return tuple(found)
