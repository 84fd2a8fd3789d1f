"""Hands a network over, through a file: the first of several processes writes it, the others read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tspc.compression import checkpoint
from tspc.models import NetworkSpec
from tspc.store.files import remove
from tspc.system import processes
from tspc.system.launch import is_first
from tspc.traversal.copying import copied

Made = tuple[nn.Module, Any]
"""A network, and plain data about it."""


def handed_over(make: Callable[[], Made], path: Path, reference: nn.Module, network: NetworkSpec) -> Made:
    """Runs `make` in all processes, which share its work; all get what the first one made.

    `path` is the file between them; it is removed.
    """
    if processes.count() == 1:
        return make()
    with processes.sharing():
        model, data = make()
        if is_first():
            checkpoint.save(model, path, network=network)
    data = processes.by_first(lambda: data)
    model = checkpoint.load(path, copied(reference))
    processes.wait()
    if is_first():
        remove(path)
    return model, data
