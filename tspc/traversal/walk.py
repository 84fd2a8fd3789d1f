"""Runs a network segment by segment, each over all calibration images.

The statistics of a layer need its inputs for every image, after the layers before it were replaced. To run the network
from its start for each layer would cost as many passes as there are layers. A walk keeps the activations between the
blocks instead, so all layers together cost a few passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tspc.layers.norms import along_channels, has_statistics, is_untouched, takes_shift
from tspc.traversal.arguments import Arguments, Call
from tspc.traversal.blocks import block_of, find_blocks
from tspc.traversal.hooks import Reached, first_argument, hooked, run_until_reached, seeded, version_of
from tspc.traversal.nested import tensors_in
from tspc.traversal.stash import Room


@dataclass(frozen=True)
class Segment:
    """A module that is called once in a forward pass, and the layers inside it in the order of their calls.

    `module` is "" for the whole network. `follows` says that its input is exactly the output of the segment before it.
    `named` are then the other arguments of the call, which are plain constants.
    """

    module: str
    layers: tuple[str, ...]
    follows: bool
    named: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """The result of one traced forward pass: the segments, the number of calls of each layer, and its batch norm.

    `batch_norms` has an entry for a layer if its output goes only into a batch norm over its channels. The norm's
    running mean can then undo a constant that is added to the output.
    """

    segments: tuple[Segment, ...]
    calls: dict[str, int]
    batch_norms: dict[str, str]


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


@dataclass(frozen=True)
class _Entry:
    """The only tensor with which a block was called (None if there were others), and its version at that time.

    An operation in place keeps the object, but changes the version. `named` are constants.
    """

    tensor: Tensor | None
    version: int | None
    named: Mapping[str, Any]


@dataclass
class _Record:
    """Data that the hooks collect during a traced pass."""

    order: list[str] = field(default_factory=list)
    entered: dict[str, list[_Entry]] = field(default_factory=dict)
    left: dict[str, tuple[Any, int | None]] = field(default_factory=dict)
    normalised: list[tuple[str, Tensor]] = field(default_factory=list)


@torch.no_grad()
def trace(model: nn.Module, layers: Collection[str], images: Tensor, blocks: list[str] | None = None) -> Trace:
    """Runs `model` on a few images and finds its segments: the named blocks, or the blocks that hold the layers."""
    blocks = find_blocks(model, layers) if blocks is None else blocks
    record, consumers = _Record(), _Consumers()

    def on_layer(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record.order.append(name)
            consumers.watched[id(output)] = name, output

        return hook

    def on_block_end(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record.left[name] = output, version_of(output)

        return hook

    def on_batch_norm(name: str) -> Callable:
        return lambda module, *given: record.normalised.append((name, first_argument(*given)))

    modules = dict(model.named_modules())
    statistics = {name: m for name, m in modules.items() if has_statistics(m) and is_untouched(m)}
    handles = [modules[name].register_forward_hook(on_layer(name), prepend=True) for name in layers]
    handles += _on_entering(model, blocks, record)
    handles += [modules[name].register_forward_hook(on_block_end(name)) for name in blocks]
    handles += [
        norm.register_forward_pre_hook(on_batch_norm(name), with_kwargs=True) for name, norm in statistics.items()
    ]
    with hooked(handles), consumers:
        answer = model(images)
    consumers.count(answer)
    _forget_variables_(record, model, blocks, images)
    calls = {name: record.order.count(name) for name in layers}
    norms = [norm for norm, _ in record.normalised]
    batch_norms = {
        name: norm
        for name, output in consumers.watched.values()
        for norm, normalised in record.normalised
        if normalised is output and consumers.counts.get(name) == calls[name] == norms.count(norm) == 1
        if along_channels(modules[name], statistics[norm], output) and takes_shift(statistics[norm], output)
    }
    return Trace(_segments(blocks, record), calls, batch_norms)


def _on_entering(model: nn.Module, blocks: list[str], record: _Record) -> list[RemovableHandle]:
    """Hooks that record the arguments of the blocks."""

    def on_block(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            plain = all(value is None or isinstance(value, bool | int | float | str) for value in kwargs.values())
            alone = len(args) == 1 and isinstance(args[0], Tensor) and plain
            entry = _Entry(args[0], version_of(args[0]), dict(kwargs)) if alone else _Entry(None, None, {})
            record.entered.setdefault(name, []).append(entry)

        return hook

    return [model.get_submodule(n).register_forward_pre_hook(on_block(n), with_kwargs=True) for n in blocks]


def _forget_variables_(record: _Record, model: nn.Module, blocks: list[str], images: Tensor) -> None:
    """A block follows no other one if its further arguments depend on the images, or cannot be compared."""
    if not any(entry.named for entries in record.entered.values() for entry in entries):
        return
    other = _Record()
    if len(images) > 1:
        with hooked(_on_entering(model, blocks, other)):
            model(images[:1])
    for name, entries in record.entered.items():
        if [entry.named for entry in entries] != [entry.named for entry in other.entered.get(name, [])]:
            record.entered[name] = [_Entry(None, None, {}) for _ in entries]


def _segments(blocks: list[str], record: _Record) -> tuple[Segment, ...]:
    called = list(dict.fromkeys(record.order))
    if any(len(calls) != 1 for calls in record.entered.values()):
        return (Segment("", tuple(called), False),)
    segments: list[Segment] = []
    before, version = None, None
    for name, (entry,) in record.entered.items():
        inside = tuple(layer for layer in called if block_of(layer, [name]) is not None)
        follows = entry.version is not None and entry.tensor is before and entry.version == version
        segments.append(Segment(name, inside, follows, entry.named if follows else {}))
        before, version = record.left[name]
    return tuple(segments)


class Walker:
    """Goes through the segments of a network: `inputs_of` looks into the present one, `advance` goes to the next.

    `images` gives a tensor for each batch; it is a Stash if `arguments` is used. The network is in eval mode. Its
    layers may be replaced during the walk. With `half`, float32 is kept as float16 if its values fit.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, images: Iterable[Tensor], room: Room, half: bool = False
    ) -> None:
        self.model, self._trace = model, trace
        self._of = lambda name: Arguments(model, name, images, room, half)
        self._position = -1
        self._arguments, self._next = self._of(""), self._of("")

    def close(self) -> None:
        """Frees the room."""
        self._arguments.clear()
        self._next.clear()

    @property
    def segment(self) -> Segment:
        return self._trace.segments[self._position]

    @property
    def _following(self) -> Segment | None:
        """The next segment, if its input is exactly the output of this one for every batch."""
        following = self._trace.segments[self._position + 1 : self._position + 2]
        return next((s for s in following if s.follows and self._arguments.is_complete), None)

    @property
    def is_called_always(self) -> bool:
        """Whether every batch calls the segment's module."""
        return self._arguments.is_complete

    @torch.no_grad()
    def answer(self) -> None:
        """Runs the segment over all batches and keeps its outputs, for `output` and for the next segment."""
        module = self.model.get_submodule(self.segment.module)
        for number, call in enumerate(self._arguments):
            if call is not None:
                with seeded(number):
                    self._keep(module(*call[0], **call[1]))

    def _keep(self, output: Any) -> None:
        """Keeps the output of the segment for a batch as the arguments of the next segment."""
        self._next.append(((output,), dict(self._following.named) if self._following else {}))

    def output(self, number: int) -> Any:
        """The output of the segment for a batch; call `answer` first."""
        return self._next.kept(number)[0][0]

    def arguments(self, number: int) -> Call:
        """The arguments of the segment's module for a batch, copied, because it may change its input in place."""
        return cast(Call, self._arguments[number])

    def shapes(self, number: int) -> tuple[torch.Size, ...]:
        """Shapes of the tensors in `arguments`."""
        return self._arguments.shapes(number)

    @torch.no_grad()
    def advance(self) -> None:
        """Goes to the next segment; the first call goes to the first one."""
        if self._following is None:
            self._next.clear()
            self._next = self._of(self._trace.segments[self._position + 1].module)
            self._next.find()
        elif len(self._next) == 0:
            self.answer()
        self._arguments.clear()
        self._position += 1
        after = self._trace.segments[self._position + 1 : self._position + 2]
        self._arguments, self._next = self._next, self._of(after[0].module if after else "")

    @torch.no_grad()
    def inputs_of(
        self, layers: Collection[str], see: Callable[[str, int, Tensor, Tensor], None], for_the_last_time: bool = False
    ) -> Iterator[None]:
        """Runs the segment batch by batch, and calls `see(layer, batch, input, output)` for the named layers.

        Yields after every batch. `for_the_last_time` says that no layer of the segment will change any more. Its
        outputs are then kept for the next segment, and not computed again.
        """
        module = self.model.get_submodule(self.segment.module)
        expected = sum(self._trace.calls[name] for name in layers)
        keeps = for_the_last_time and self._following is not None
        for number, call in enumerate(self._arguments):
            if call is None:
                continue
            given, named = call
            seen = 0

            def hook(name: str, batch: int) -> Callable:
                def on_call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                    nonlocal seen
                    see(name, batch, first_argument(args, kwargs), output)
                    seen += 1
                    if seen == expected and not keeps:
                        raise Reached

                return on_call

            handles = [
                self.model.get_submodule(name).register_forward_hook(hook(name, number), with_kwargs=True, prepend=True)
                for name in layers
            ]
            with seeded(number):
                if keeps:
                    with hooked(handles):
                        self._keep(module(*given, **named))
                else:
                    run_until_reached(module, handles, *given, **named)
            yield
