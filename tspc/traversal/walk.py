"""Runs a network segment by segment, each over all calibration images.

The statistics of a layer need its inputs for every image, after the layers before it were replaced. To run the network
from its start for each layer would cost as many passes as there are layers. A walk keeps the activations between the
blocks instead, so all layers together cost a few passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.traversal.arguments import Arguments
from tspc.traversal.handing import Call, NextCall
from tspc.traversal.hooks import Reached, first_argument, hooked, run_until_reached, seeded
from tspc.traversal.nested import tensors_in
from tspc.traversal.stash import Room, Stash
from tspc.traversal.tracing import Segment, Trace


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
        self._outputs = Stash(room, half)

    def close(self) -> None:
        """Frees the room."""
        for kept in (self._arguments, self._next, self._outputs):
            kept.clear()

    @property
    def segment(self) -> Segment:
        return self._trace.segments[self._position]

    @property
    def _following(self) -> Segment | None:
        """The next segment, if its calls follow from those of this one for every batch."""
        following = self._trace.segments[self._position + 1 : self._position + 2]
        return next((s for s in following if s.call is not None and self._arguments.is_complete), None)

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
        for number, call in enumerate(self._arguments):
            if call is not None:
                given = list(tensors_in(call))
                with seeded(number):
                    output = module(*call[0], **call[1])
                if keeps_output:
                    self._outputs.append(output)
                self._hand_over(given, output)

    @property
    def _is_next_argument(self) -> bool:
        """Whether the output is kept as the only argument of the next segment."""
        return self._following is not None and cast(NextCall, self._following.call).is_plain

    def _hand_over(self, given: Sequence[Tensor], output: Any) -> None:
        """Keeps the arguments of the next segment for a batch."""
        if self._following is not None:
            self._next.append(cast(NextCall, self._following.call).made(given, output))

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
            self._next = self._of(self._trace.segments[self._position + 1].module)
            self._next.find()
        elif len(self._next) == 0:
            self._run(keeps_output=False)
        self._arguments.clear()
        self._outputs.clear()
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
            positional, named = call
            given, seen = list(tensors_in(call)), 0

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
                        result = module(*positional, **named)
                    self._hand_over(given, result)
                else:
                    run_until_reached(module, handles, *positional, **named)
            yield
