"""Finds the blocks of a network in its module tree. Distillation and `rate_decay` work block by block."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from tspc.errors import ConfigError
from tspc.layers.dense import has_inputs


def find_blocks(model: nn.Module, layers: Collection[str], pattern: str | None = None) -> list[str]:
    """Names of the blocks that hold at least one of the named `layers`, in module order.

    Containers (`nn.Sequential`, `nn.ModuleList`) are opened, and so are modules that contain a sequence of repeated
    blocks. Every other module is one block, for example a residual block, a transformer block or a single layer.
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
    return [name for name in _leaves("", model, is_root=True) if _holds(name, layers)]


def block_of(layer: str, blocks: list[str]) -> int | None:
    """Index of the block that holds the named layer."""
    return next((i for i, block in enumerate(blocks) if _holds(block, [layer])), None)


def _holds(block: str, layers: Collection[str]) -> bool:
    return any(layer == block or layer.startswith(f"{block}.") for layer in layers)


def _leaves(name: str, module: nn.Module, is_root: bool = False) -> list[str]:
    children = list(module.named_children())
    if not children or not (is_root or _is_container(module) or _has_repeated_blocks(module)):
        return [name]
    prefix = f"{name}." if name else ""
    return [leaf for child_name, child in children for leaf in _leaves(prefix + child_name, child)]


def _is_container(module: nn.Module) -> bool:
    # A subclass of Sequential is a block; only the plain types are containers.
    return type(module) in (nn.Sequential, nn.ModuleList)


def _has_repeated_blocks(module: nn.Module) -> bool:
    """Whether the module is or contains a sequence of two or more blocks of the same class."""
    for inner in module.modules():
        if isinstance(inner, nn.Sequential | nn.ModuleList):
            children = list(inner.children())
            if len(children) > 1 and len({type(c) for c in children}) == 1 and all(map(_is_block, children)):
                return True
    return False


def _is_block(module: nn.Module) -> bool:
    # A block has at least two layers with weights; a convolution with its normalisation is none.
    return not _is_container(module) and sum(map(_has_kernel, module.modules())) > 1


def _has_kernel(module: nn.Module) -> bool:
    # Layers of subclasses stay dense, but they count here.
    return has_inputs(module) or isinstance(module, nn.Conv2d | nn.Linear)
