"""Runs a network segment by segment, each over all calibration images.

The statistics of a layer need its inputs for every image, after the layers before it were replaced. To run the network
from its start for each layer would cost as many passes as there are layers. A walk keeps the activations between the
blocks instead, so all layers together cost a few passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tspc.data.model_inputs import Given
from tspc.traversal.arguments import Arguments
from tspc.traversal.handing import Call
from tspc.traversal.hooks import Reached, first_argument, hooked, run_until_reached, running
from tspc.traversal.leaps import leap
from tspc.traversal.nested import tensors_in
from tspc.traversal.stash import Room, Stash
from tspc.traversal.tracing import Segment, Trace


class Walker:
    """Goes through the segments of a network; `calls_of` and `inputs_of` look into one, `advance` goes to the next.

    `images` gives each batch of inputs; it is a Stash if `arguments` is used. The network is in eval mode. Its
    layers may be replaced during the walk. With `half`, float32 is kept as float16 if its values fit; with `short` the
    network runs in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        images: Iterable[Given],
        room: Room,
        half: bool = False,
        short: bool = False,
    ) -> None:
        self.model, self.trace = model, trace
        self._of = lambda name: Arguments(model, name, images, room, half, short)
        self._images, self._short = images, short
        self._position = -1
        self._arguments, self._next = self._of(""), self._of("")
        self._outputs = Stash(room, half)

    def close(self) -> None:
        """Frees the room."""
        for kept in (self._arguments, self._next, self._outputs):
            kept.clear()

    @property
    def segment(self) -> Segment:
        return self.trace.segments[self._position]

    @property
    def _following(self) -> Segment | None:
        """The next segment, if its calls follow from those of this one for every batch."""
        following = self.trace.segments[self._position + 1 : self._position + 2]
        return next((s for s in following if s.follows and self._arguments.is_complete), None)

    @property
    def is_called_always(self) -> bool:
        """Whether every batch calls the segment's module."""
        return self._arguments.is_complete

    @torch.no_grad()
    def answer(self) -> None:
        """Runs the segment over all batches and keeps its outputs, for `output` and for the next segment."""
        self._run(keeps_output=not self._is_next_argument)

    def _run(self, keeps_output: bool) -> None:
        module = self.model.get_submodule(self.segment.module)
        for number, (call, images) in enumerate(self._calls()):
            if call is not None:
                given = list(tensors_in(call))
                with running(number, self._short):
                    output = module(*call[0], **call[1])
                if keeps_output:
                    self._outputs.append(output)
                self._hand_over(number, images, given, call, output)

    def _calls(self) -> Iterator[tuple[Call | None, Given | None]]:
        """The arguments of the segment's module for each batch, and the images if the next segment needs them."""
        needed = self._following is not None and self._following.call is None
        return zip(self._arguments, self._images if needed else repeat(None), strict=False)

    @property
    def _is_next_argument(self) -> bool:
        """Whether the output is kept as the only argument of the next segment."""
        call = None if self._following is None else self._following.call
        return call is not None and call.is_plain

    def _hand_over(self, number: int, images: Given | None, given: Sequence[Tensor], before: Call, output: Any) -> None:
        """Keeps the arguments of the next segment for a batch."""
        following = self._following
        if following is not None and following.call is not None:
            self._next.append(following.call.made(given, before, output))
        elif following is not None and images is not None:
            call = leap(self.model, following.skipped, output, following.module, images, number, self._short)
            self._next.append(self._next.made(number, images) if call is None else call)

    def output(self, number: int) -> Any:
        """The output of the segment for a batch; call `answer` first."""
        return self._next.kept(number)[0][0] if self._is_next_argument else self._outputs[number]

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
            self._next = self._of(self.trace.segments[self._position + 1].module)
            self._next.find()
        elif not self._next.is_found:
            self._run(keeps_output=False)
        self._arguments.clear()
        self._outputs.clear()
        self._position += 1
        after = self.trace.segments[self._position + 1 : self._position + 2]
        self._arguments, self._next = self._next, self._of(after[0].module if after else "")

    @torch.no_grad()
    def calls_of(
        self, layers: Collection[str], see: Callable[[str, int, Tensor, Tensor], None], for_the_last_time: bool = False
    ) -> None:
        """Runs the segment batch by batch, and calls `see(layer, batch, input, output)` for the named layers.

        `for_the_last_time` says that no layer of the segment will change any more. Its outputs are then kept for the
        next segment, and not computed again.
        """
        keeps = for_the_last_time and self._following is not None

        def hooks(number: int, seen: Callable[[], None]) -> list[RemovableHandle]:
            def hook(name: str) -> Callable[..., None]:
                def on_call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                    see(name, number, first_argument(args, kwargs), output)
                    seen()

                return on_call

            register = lambda m, hook: m.register_forward_hook(hook, with_kwargs=True, prepend=True)  # noqa: E731
            return [register(self.model.get_submodule(name), hook(name)) for name in layers]

        self._watch(layers, hooks, keeps)

    @torch.no_grad()
    def inputs_of(self, layers: Collection[str], see: Callable[[str, int, Tensor], None]) -> None:
        """Runs the segment up to its named layers, batch by batch, and calls `see(layer, batch, input)`.

        The last call of such a layer is not computed.
        """

        def hooks(number: int, seen: Callable[[], None]) -> list[RemovableHandle]:
            def hook(name: str) -> Callable[..., None]:
                def before_call(module: nn.Module, args: Any, kwargs: Any) -> None:
                    see(name, number, first_argument(args, kwargs))
                    seen()

                return before_call

            # After the user's own hooks, which may change the input.
            register = lambda m, hook: m.register_forward_pre_hook(hook, with_kwargs=True)  # noqa: E731
            return [register(self.model.get_submodule(name), hook(name)) for name in layers]

        self._watch(layers, hooks, False)

    def _watch(
        self,
        layers: Collection[str],
        hooks: Callable[[int, Callable[[], None]], list[RemovableHandle]],
        keeps: bool,
    ) -> None:
        """Runs the segment over all batches, with `hooks(batch, seen)`; each of these says when a call was seen.

        A pass ends after the last call, or goes on to the end if it `keeps` the arguments of the next segment.
        """
        module = self.model.get_submodule(self.segment.module)
        expected = sum(self.trace.calls[name] for name in layers)
        for number, (call, images) in enumerate(self._calls()):
            if call is None:
                continue
            left = expected

            def seen() -> None:
                nonlocal left
                left -= 1
                if left == 0 and not keeps:
                    raise Reached

            positional, named = call
            with running(number, self._short):
                if keeps:
                    given = list(tensors_in(call))
                    with hooked(hooks(number, seen)):
                        result = module(*positional, **named)
                    self._hand_over(number, images, given, call, result)
                else:
                    run_until_reached(module, hooks(number, seen), *positional, **named)
