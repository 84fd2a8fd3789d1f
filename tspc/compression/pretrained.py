"""`save_pretrained` of compressed networks: those of transformers save what `tspc.load` reads, others refuse."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from tspc.compression.integers import ENTRY, on_grids
from tspc.layers.forms import tensorized_layers
from tspc.layers.replacing import forbid_save_pretrained_, saves_pretrained
from tspc.layers.ties import forget_ties_
from tspc.models.transformers_folders import is_of_transformers

HOLDS_INTEGERS = "the file holds integers; read the network with tspc.load(folder), and train it anew from there"


def mend_save_pretrained_(model: nn.Module) -> None:
    """Lets `save_pretrained` of compressed networks write what `tspc.load` reads; it is what a Trainer saves with.

    The library's own would write files that `from_pretrained` fills with random values. Networks of other libraries
    that have such a function refuse. `tie_weights` leaves the compressed layers alone.
    """
    forget_ties_(model)
    for module in saves_pretrained(model):
        if not tensorized_layers(module):
            continue
        if not is_of_transformers(module):
            forbid_save_pretrained_(module)
            continue
        module.save_pretrained = SavesFolder(module)  # type: ignore[assignment]
        if on_grids(module) and _refuse_integers not in _own_hooks(module):
            module.register_load_state_dict_pre_hook(_refuse_integers)


class SavesFolder:
    """`folders.save_pretrained` of one module. It does not keep the module alive, and its copies belong to copies."""

    def __init__(self, module: nn.Module) -> None:
        self._of = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        from tspc.compression.folders import save_pretrained

        module = self._of()
        assert module is not None
        save_pretrained(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavesFolder:
        module = self._of()
        return SavesFolder(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return SavesFolder, (self._of(),)


def _own_hooks(module: nn.Module) -> list[Any]:
    return [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]


def _refuse_integers(module: nn.Module, state: Any, prefix: str, *others: Any) -> None:
    """Keeps a state with integers from being loaded in part, as a Trainer does that resumes."""
    errors: list[str] = others[-1]
    if HOLDS_INTEGERS not in errors and any(f"{prefix}{name}.{ENTRY}" in state for name in on_grids(module)):
        errors.append(HOLDS_INTEGERS)
