"""How a network is called: which tensors by position and which by name, and which of their axes are free in a graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tspc.data.model_inputs import ModelInputs
from tspc.data.padding import is_mask
from tspc.errors import ExportError
from tspc.models.transformers_folders import is_of_transformers

Inputs = tuple[Tensor, ...]
"""The tensors of a call: those by position, then those by name."""
Call = Tensor | Sequence[Tensor] | Mapping[str, Any] | ModelInputs
"""What a user gives as an example of a call."""

EMBEDDED = ("inputs_embeds", "decoder_inputs_embeds")
"""Arguments with a vector in the place of each token."""
FEWEST = 4
"""So many tokens show a tracer that their number is free. One or two of them would be taken for constants."""


@dataclass(frozen=True)
class Signature:
    """The tensors of a call in order: `positional` many by position, the others by `names`.

    `constants` are arguments that are no tensors; they are the same in every call. `places` are the names of those by
    position, where there are several and `forward` has names for all.
    """

    positional: int = 1
    names: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example: Call) -> Signature:
        """The signature of an example. A decoder of transformers does not return its caches unless it is asked to.

        Raises ExportError for an argument by position that is no tensor, and if there is no tensor.
        """
        batch = _as_batch(example)
        if not all(isinstance(value, Tensor) for value in batch.positional):
            raise ExportError("an argument by position is no tensor; pass such arguments by name, in a dict")
        tensors = tuple(name for name, value in batch.named.items() if isinstance(value, Tensor))
        constants = {name: value for name, value in batch.named.items() if name not in tensors and value is not None}
        if is_of_transformers(model) and "use_cache" in inspect.signature(model.forward).parameters:
            constants.setdefault("use_cache", False)
        return cls(len(batch.positional), tensors, constants, _places(model, len(batch.positional)))

    def tensors(self, call: Call) -> Inputs:
        """The tensors of another call like this one, or of a tuple of all of them. Raises ExportError for others."""
        if isinstance(call, tuple) and len(call) == self.positional + len(self.names):
            return call
        batch = _as_batch(call)
        named = {name: value for name, value in batch.named.items() if isinstance(value, Tensor)}
        if len(batch.positional) != self.positional or set(named) != set(self.names):
            raise ExportError(f"inputs {sorted(named)} by name, expected {sorted(self.names)}")
        return (*batch.positional, *(named[name] for name in self.names))

    def arguments(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One value for each tensor, by position and by name."""
        return tuple(values[: self.positional]), dict(zip(self.names, values[self.positional :], strict=True))

    def call(self, model: Any, inputs: Inputs) -> Any:
        """What a network answers."""
        positional, named = self.arguments(inputs)
        return model(*positional, **named, **self.constants)

    def bound(self, model: nn.Module) -> nn.Module:
        """The network as one that takes the tensors alone, by their names."""
        kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
        takes_any = kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        return _Bound(model, self.input_names, self.constants) if self.constants or takes_any else model

    @property
    def input_names(self) -> list[str]:
        """A name for each tensor in a graph; one alone by position is the `input`."""
        places = self.places or tuple(f"input{i}" if i else "input" for i in range(self.positional))
        return [*places, *self.names]

    def lengths(self, inputs: Inputs) -> dict[int, str]:
        """For each tensor whose axis 1 counts tokens the name of that axis, by the tensor's place.

        These are token numbers, masks and the like, (N, L), and embedded tokens (N, L, width). Tensors of one length
        share the name; a decoder's are apart.
        """
        found: dict[int, str] = {}
        names: dict[tuple[bool, int], str] = {}
        for place, (name, x) in enumerate(zip(self.input_names, inputs, strict=True)):
            whole = not x.is_floating_point() and not x.is_complex()
            is_of_tokens = x.ndim == 2 and (whole or is_mask(name))
            if x.ndim < 2 or not (is_of_tokens or name in EMBEDDED):
                continue
            key = name.startswith("decoder_"), x.shape[1]
            if key not in names:
                stem = "decoder_length" if key[0] else "length"
                same = sum(other.startswith(stem) for other in names.values())
                names[key] = f"{stem}{same}" if same else stem
            found[place] = names[key]
        return found

    def shapes(self, inputs: Inputs, free: bool) -> list[dict[int, Dim]]:
        """For each tensor its free axes: the batch, and the lengths if they are `free`."""
        batch = Dim("batch", min=1)
        names = self.lengths(inputs) if free else {}
        # With one token the graph would be another one: attention needs no mask then.
        dims = {name: Dim(name, min=2) for name in names.values()}
        return [{0: batch} | ({1: dims[names[i]]} if i in names else {}) for i in range(len(inputs))]

    def is_short(self, inputs: Inputs) -> bool:
        """Whether an axis counts tokens, and they are too few to leave some out."""
        return any(inputs[place].shape[1] < FEWEST for place in self.lengths(inputs))

    def longer(self, inputs: Inputs) -> Inputs:
        """The same with some more tokens, each the last one again, so that masks stay those of one end."""
        places = self.lengths(inputs)
        more = lambda x: torch.cat([x, *[x[:, -1:]] * FEWEST], dim=1)  # noqa: E731
        return tuple(more(x) if place in places else x for place, x in enumerate(inputs))

    def shorter(self, inputs: Inputs) -> Inputs | None:
        """The same with about half of the tokens; None if no axis counts them, or they are too few."""
        places = self.lengths(inputs)
        if not places or self.is_short(inputs):
            return None
        return tuple(x[:, : x.shape[1] // 2 + 1] if place in places else x for place, x in enumerate(inputs))

    def example(self, inputs: Inputs) -> Inputs:
        """Tensors of these shapes without the user's data: zeros, and masks of ones."""
        named = zip(self.input_names, inputs, strict=True)
        return tuple(torch.ones_like(x) if "mask" in name else torch.zeros_like(x) for name, x in named)


class _Bound(nn.Module):
    """A network with some of its arguments given; the others have these names, which torch.export reads."""

    def __init__(self, network: nn.Module, names: Sequence[str], constants: dict[str, Any]) -> None:
        super().__init__()
        self.network = network

        def forward(*args: Tensor, **kwargs: Tensor) -> Any:
            return network(*args, **kwargs, **constants)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # pyright: ignore
        self.forward = forward


def _places(model: nn.Module, count: int) -> tuple[str, ...]:
    """The names that `forward` has for so many arguments by position; none for one alone, or if it lacks a name."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [name for name, one in inspect.signature(model.forward).parameters.items() if one.kind in kinds]
    return tuple(own[:count]) if 1 < count <= len(own) else ()


def _as_batch(call: Call) -> ModelInputs:
    if isinstance(call, ModelInputs):
        return call
    if isinstance(call, Tensor):
        return ModelInputs((call,))
    return ModelInputs((), dict(call)) if isinstance(call, Mapping) else ModelInputs(tuple(call))
