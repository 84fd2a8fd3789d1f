"""The data on which a block is trained: kept activations of the compressed network and of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from tspc.data import Given, first_of, generator_of, masks_of, shapes_of
from tspc.data.answers import named_answer
from tspc.errors import ConfigError
from tspc.layers.unpacking import sequence_of
from tspc.phases.context import Context
from tspc.system import processes
from tspc.training import Recipe
from tspc.traversal.handing import Call
from tspc.traversal.nested import UnknownValueError, tensors_in
from tspc.traversal.regular import is_regular
from tspc.traversal.stash import Room, Stash
from tspc.traversal.tracing import Trace
from tspc.traversal.walk import Walker

VIEWS = 4
"""The largest number of augmentations of one training image."""
JUDGES = 8
"""One of this number of kept batches judges, and is not trained on."""


@dataclass(frozen=True)
class Masked:
    """The arguments of a block, and which positions of the batch hold something; see `tspc.data.masks_of`."""

    call: Call
    masks: list[Tensor]

    @property
    def first(self) -> Any:
        """The first argument."""
        args, named = self.call
        return next(iter((*args, *named.values())))

    def answer(self, block: nn.Module) -> Tensor:
        """What a block passes on for them."""
        args, named = self.call
        found = passed_on(block, block(*args, **named))
        assert found is not None
        return found


def passed_on(block: nn.Module, output: Any) -> Tensor | None:
    """The tensor in a block's output that the network goes on with; None if several may be it, or none."""
    output = sequence_of(block, output)
    named = output if isinstance(output, Tensor) else named_answer(output)
    tensors = list(tensors_in(output)) if named is None else [named]
    return tensors[0] if len(tensors) == 1 else None


def augmented_images(recipe: Recipe, wanted: int, context: Context, room: Room) -> Stash:
    """Batches with about as many training images as wanted, each augmented once: one pass over the split or more."""
    data, feed = context.required_data, context.feed(recipe)
    images = Stash(room)
    batches = max(2, min(wanted, VIEWS * data.train_size) // recipe.batch_size)
    for epoch in count():
        for batch, _ in data.train_batches(feed, epoch):
            images.append(batch)
            if len(images) == batches:
                return images
    raise AssertionError


class Kept:
    """The inputs of a block and the reference's outputs, batch by batch; `advance` goes to the next block."""

    def __init__(
        self, reference: nn.Module, model: nn.Module, trace: Trace, images: Stash, room: Room, inputs: str, seed: int
    ) -> None:
        self._reference = Walker(reference, trace, images, room, half=True)
        self._small = None if inputs == "parallel" else Walker(model, trace, images, room, half=True)
        self._walkers = [walker for walker in (self._reference, self._small) if walker is not None]
        self._inputs, self._seed, self._images = inputs, seed, images
        self._masks = [masks_of(batch) for batch in images]
        self._sizes = [shapes_of(batch) for batch in images]
        self._device = first_of(images[0]).device
        self.is_paired = True
        """Whether the inputs that one network gives the block belong to the outputs of the other's block."""
        self._judging = max(1, len(images) // JUDGES)
        self.per_epoch = len(images) - self._judging

    def advance(self) -> None:
        """Goes to the next block after the training of the present one.

        Raises ConfigError for a block whose output has no tensor, or several, any of which may be passed on.
        """
        for walker in self._walkers:
            walker.advance()
        self.is_paired = self._looks_paired()
        try:
            self._reference.answer()
            output = self._reference.output(0) if self.is_paired else torch.empty(0)
            kind = "" if passed_on(self._block, output) is not None else type(output).__name__
        except UnknownValueError as error:
            kind = error.kind
        if kind:
            name = self._reference.segment.module or "(the whole network)"
            told = f"block {name} gives {kind}, which is not one tensor, nor has a known name for its answer"
            raise ConfigError([f"{told}; name others by phase.distill.blocks='PATTERN'"])

    def _looks_paired(self) -> bool:
        """Whether both networks, in all processes, give the block inputs of one shape for every batch."""
        is_paired = all(walker.is_called_always for walker in self._walkers)
        if is_paired and len(self._walkers) > 1:
            one, other = ([walker.shapes(n) for n in range(len(self._images))] for walker in self._walkers)
            # The first argument alone: a mask may be None for a batch without padding.
            is_paired = one == other and is_regular([shapes[:1] for shapes in one], self._sizes)
        unpaired = torch.tensor(float(not is_paired), device=self._device)
        return float(processes.summed(unpaired)) == 0

    def read(self, epoch: int, start: int) -> Iterator[tuple[Masked, Tensor]]:
        for number in torch.randperm(self.per_epoch, generator=generator_of(self._seed, epoch))[start:].tolist():
            yield self._pair(number, from_reference=self._inputs == "mixed" and (number + epoch) % 2 == 1)

    def show(self, blocks: Sequence[nn.Module], batches: int) -> None:
        """Sends the first kept batches through the block, and also through the reference's if it is given."""
        for number in range(min(batches, self.per_epoch)):
            for block, walker in zip(blocks, (self._small or self._reference, self._reference), strict=False):
                args, named = walker.arguments(number)
                block(*args, **named)

    def training(self) -> Iterator[tuple[Masked, Tensor]]:
        """All batches for training."""
        return (self._pair(number) for number in range(self.per_epoch))

    def judging_images(self) -> Iterator[Given]:
        return (self._images[self.per_epoch + number] for number in range(self._judging))

    def judging(self) -> Iterator[tuple[Masked, Tensor]]:
        """All batches that judge; they are not trained on."""
        return (self._pair(self.per_epoch + number) for number in range(self._judging))

    @property
    def _block(self) -> nn.Module:
        return self._reference.model.get_submodule(self._reference.segment.module)

    def _pair(self, number: int, from_reference: bool = False) -> tuple[Masked, Tensor]:
        walker = self._reference if from_reference else self._small or self._reference
        target = passed_on(self._block, self._reference.output(number))
        assert target is not None
        return Masked(walker.arguments(number), self._masks[number]), target
