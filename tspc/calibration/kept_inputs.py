"""Keeps the calibration inputs, and gives them in the form that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tspc.calibration.batches import Batches
from tspc.calibration.row_order import BY_INPUT, arranged_masks, row_orders
from tspc.data.arranging import ITEMS, arranged, labels_of, with_labels
from tspc.data.model_inputs import KINDS, Given, ModelInputs, called, few_of, first_of, kind_of, masks_of, shapes_of
from tspc.errors import DataError
from tspc.layers.dense import kind_of as kind_of_layer
from tspc.system.tally import Tally
from tspc.traversal.hooks import evaluating
from tspc.traversal.stash import Room, Stash


class KeptInputs:
    """The first `samples` inputs, in batches, on the device.

    Before `suit` they are as the loader gave them; of a tuple only the first tensor is given. Raises DataError if there
    are none.
    """

    def __init__(self, inputs: Any, samples: int, batch_size: int, room: Room, tally: Tally) -> None:
        self.device: torch.device | None = None
        self.layout: torch.memory_format | None = None
        self.count = 0
        """The number of inputs."""
        self._raw = Stash(room)
        self._shapes: list[tuple[torch.Size, ...]] = []
        self._masks: list[list[Tensor]] = []
        self.orders: dict[str, str] = {}
        """How the layers arrange their rows, where it matters; see `row_order`."""
        batches = Batches(inputs, samples, batch_size)
        with tally.expecting(-(-samples // batch_size)):
            for batch in batches:
                self._raw.append(batch)
                self._shapes.append(shapes_of(first_of(batch)))
                self.count += len(batch)
                tally.add(f"{self.count} inputs read")
        if self.count == 0:
            raise DataError("calibration needs at least one input, but the data gave none")
        self._form, self._model = batches.form, None
        self._arrange: Callable[[Given], Given] = first_of if batches.form == ITEMS else lambda batch: batch

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._raw)

    def __iter__(self) -> Iterator[Given]:
        """The inputs, batch by batch."""
        return (self._placed(self._arrange(batch)) for batch in self._raw)

    def _placed(self, batch: Given) -> Given:
        own = batch if self.device is None else batch.to(self.device)
        return own if self.layout is None else own.contiguous(memory_format=self.layout)

    def shapes(self, number: int) -> tuple[torch.Size, ...]:
        """The shapes of all tensors of a batch, as the network takes it; before `suit` that of the first one."""
        return self._shapes[number]

    def masks(self, number: int, layer: str = "") -> list[Tensor]:
        """Which positions of a batch hold something; see `tspc.data.masks_of`. For a layer they have its order."""
        found = self._masks[number] if self._masks else []
        return arranged_masks(found, self.orders.get(layer, BY_INPUT))

    def see_orders(self, model: nn.Module) -> None:
        """Looks in which order the layers of a network have their rows, if it matters: some inputs are padded."""
        padded = any(self._masks)
        batch = next((batch for batch in self if len(batch) > 1), None) if padded else None
        self.orders = {}
        if isinstance(batch, ModelInputs):
            names = [name for name, module in model.named_modules() if kind_of_layer(module) is not None]
            self.orders = row_orders(model, names, batch)

    def suit(self, model: nn.Module) -> None:
        """From now on the inputs are the arguments that `model` takes. Raises DataError if it takes nothing of them."""
        if self._model is model:
            return
        self._arrange = lambda batch: arranged(model, batch, self._form)
        raw = self._raw[0]
        if labels_of(raw) is not None and not self._works(model) and not isinstance(raw, Tensor):
            self._arrange = lambda batch: with_labels(model, batch, self._form)
            if not self._works(model):
                self._arrange = lambda batch: arranged(model, batch, self._form)
        self._masks = []
        if not isinstance(self._arrange(raw), Tensor):
            found = [(shapes_of(batch), masks_of(batch)) for batch in self]
            self._shapes, self._masks = [shapes for shapes, _ in found], [masks for _, masks in found]
        self._model = model

    @torch.no_grad()
    def _works(self, model: nn.Module) -> bool:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            try:
                called(model, next(iter(self))[:2])
            except Exception:  # the network may be the user's own
                return False
        return True

    def kinds(self) -> list[Given]:
        """As `tspc.data.kinds_of`, without reading all batches."""
        wanted: dict[Any, int] = {}
        for number, shapes in enumerate(self._shapes):
            wanted.setdefault(kind_of(shapes, self.masks(number)), number)
        chosen = list(wanted.values())[:KINDS]
        return [few_of(self._placed(self._arrange(self._raw[number])), self.masks(number)) for number in chosen]
