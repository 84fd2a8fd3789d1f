"""Finds the blocks of a network in its module tree. Distillation and `rate_decay` work block by block."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from tspc.errors import ConfigError
from tspc.traversal.repetition import holds_repetition, is_container, repeated


def find_blocks(model: nn.Module, layers: Collection[str], pattern: str | None = None) -> list[str]:
    """Names of the blocks that hold at least one of the named `layers`, in module order.

    Containers (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`) are opened, and so are modules that contain blocks
    with the same structure one after the other (see `repetition`). Every other module is one block, for example a
    residual block, a transformer block or a single layer.
    `pattern` (shell wildcards over module names, such as `layer?.*`) names the blocks instead.

    Raises ConfigError if the pattern matches no module with such a layer.
    """
    modules = dict(model.named_modules())
    if pattern is not None:
        matched = [name for name in modules if name and fnmatchcase(name, pattern)]
        # Only the outermost of nested matches is taken: layer?.* matches layer1.0 and layer1.0.conv1.
        outer = [n for n in matched if not any(n.startswith(f"{m}.") for m in matched)]
        blocks = [name for name in outer if _holds(name, layers)]
        if not blocks:
            raise ConfigError([f"blocks={pattern!r} matches no module of the network that has a tensorized layer"])
        return blocks
    kinds = {type(child) for module in model.modules() for _, child in repeated(module)}
    return [name for name in _leaves("", model, kinds, is_root=True, is_repeated=False) if _holds(name, layers)]


def block_of(layer: str, blocks: list[str]) -> int | None:
    """Index of the block that holds the named layer."""
    return next((i for i, block in enumerate(blocks) if _holds(block, [layer])), None)


def _holds(block: str, layers: Collection[str]) -> bool:
    return any(layer == block or layer.startswith(f"{block}.") for layer in layers)


def _leaves(name: str, module: nn.Module, kinds: Collection[type], is_root: bool, is_repeated: bool) -> list[str]:
    """Names of the blocks in `module`. `kinds` are the classes of the parts that repeat anywhere in the network.

    `is_repeated` says that the module is, or lies in, one of several parts that repeat.
    """
    children = list(module.named_children())
    is_repeated = is_repeated or type(module) in kinds
    if not children or not (is_root or is_container(module) or holds_repetition(module, is_repeated)):
        return [name]
    prefix, members = f"{name}." if name else "", {child for child, _ in repeated(module)}
    return [
        leaf
        for own, child in children
        for leaf in _leaves(prefix + own, child, kinds, is_root=False, is_repeated=is_repeated or own in members)
    ]
