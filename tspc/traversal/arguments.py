"""Keeps the arguments of a module for each batch, so that the network need not run from its start."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.data.model_inputs import Given, arguments_of
from tspc.errors import TspcWarning
from tspc.traversal.handing import Call
from tspc.traversal.hooks import Reached, run_on, running
from tspc.traversal.nested import UnknownValueError, mapped, tensors_in
from tspc.traversal.stash import Room, Stash


class Arguments:
    """The arguments of the module `name` of `model` ("": the whole network) for each batch of `images`.

    Reading gives a copy, because a module may change its input in place, or None if the batch does not call the module.
    `append` or `find` provides the arguments. With `half`, float32 is kept as float16 if its values fit; with
    `short` the network runs in bfloat16.
    """

    def __init__(
        self, model: nn.Module, name: str, images: Iterable[Given], room: Room, half: bool, short: bool
    ) -> None:
        self._model, self._name, self._images, self._short = model, name, images, short
        self._kept = Stash(room, half)
        self._is_kept = name != ""
        self.is_complete = True
        """Whether every batch calls the module."""

    def append(self, call: Call | None) -> None:
        """Adds the arguments of the next batch; if they cannot be kept, those of no batch are."""
        self.is_complete &= call is not None
        if not self._is_kept:
            return
        try:
            self._kept.append(call)
        except UnknownValueError as error:
            self._kept.clear()
            self._is_kept = False
            text = f"{self._name} is called with a {error.kind}, which cannot be kept"
            warnings.warn(
                f"{text}: the network runs from its start instead, which takes longer; the result is the same",
                TspcWarning,
                stacklevel=2,
            )

    def find(self) -> None:
        """Runs the network over all images up to the module.

        Arguments that cannot be kept are computed again each time they are read.
        """
        for number, images in enumerate(self._images if self._name else ()):
            self.append(self.made(number, images))

    @torch.no_grad()
    def made(self, number: int, images: Given) -> Call | None:
        """The arguments for a batch of images, found by running the network up to the module."""
        if self._name == "":
            return arguments_of(images.clone())
        found: list[Call] = []

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append((args, kwargs))
            raise Reached

        module = self._model.get_submodule(self._name)
        with running(number, self._short):
            run_on(self._model, [module.register_forward_pre_hook(hook, with_kwargs=True)], images)
        return found[0] if found else None

    @property
    def is_found(self) -> bool:
        """Whether the arguments are known, or known to be made again."""
        return len(self._kept) > 0 or (self._name != "" and not self._is_kept)

    def kept(self, number: int) -> Call:
        """The arguments for a batch, not copied; the caller must not change them."""
        return self._kept[number]

    def shapes(self, number: int) -> tuple[torch.Size, ...]:
        """Shapes of the tensors in the arguments for a batch; empty for images."""
        if self._name == "":
            return ()
        return self._kept.shapes(number) if self._is_kept else tuple(t.shape for t in tensors_in(self[number]))

    def __getitem__(self, number: int) -> Call | None:
        """A copy of the arguments for a batch. `images` must then support indexing by the batch's number."""
        return self._copy(number) if self._is_kept else self.made(number, cast(Stash, self._images)[number])

    def __iter__(self) -> Iterator[Call | None]:
        if self._is_kept:
            return (self._copy(number) for number in range(len(self._kept)))
        return (self.made(number, images) for number, images in enumerate(self._images))

    def _copy(self, number: int) -> Call | None:
        return mapped(self._kept[number], Tensor.clone)

    def clear(self) -> None:
        """Frees the room."""
        self._kept.clear()
