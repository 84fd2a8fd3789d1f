"""Finds parts of a network that repeat: several in one container with the same structure, whatever their layers are.

The structure of a module is the tree of the classes of its parts. Sizes may differ: the blocks of a convolutional
network become wider with depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from tspc.layers.dense import EMBEDDING, has_inputs, kind_of

Children = list[tuple[str, nn.Module]]

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Containers, the names of whose parts say nothing. Elsewhere repeated parts have numbered names, as block1, block2."""
LEAST, LEAST_NUMBERED, LEAST_SINGLE = 2, 3, 5
"""The numbers of repeated parts from which on they are blocks: in a container, under numbered names, and of parts in a
container that have a single kernel each. Fewer of the latter are the inside of a block."""

_NUMBERED = re.compile(r"(.*?)_?\d+[a-z]?")
_KERNELS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.modules.conv._ConvNd)


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others. A subclass of such a class is a block."""
    return type(module) in LISTS


def holds_repetition(module: nn.Module, is_repeated: bool) -> bool:
    """Whether the module is or contains a sequence of blocks, so that it is no block itself.

    If the module `is_repeated` itself, it is a stage or a block. In a stage all parts of a list have one class and may
    follow each other. The heads of an attention and the experts of a mixture stand side by side: they make no stage.
    """
    if not is_repeated:
        return any(repeated(inner) for inner in module.modules())
    inside = dict(module.named_modules())
    lists = ((name, inner) for name, inner in inside.items() if isinstance(inner, nn.Sequential | nn.ModuleList))
    return any(_is_sequence(inner) and not _has_router(inside, name) for name, inner in lists)


def repeated(module: nn.Module) -> Children:
    """The children of a module that repeat: several blocks with the same structure.

    A block has at least two layers with weights; a convolution with its normalisation is one only in a longer sequence.
    """
    children = list(module.named_children())
    blocks = [child for child in children if _is_block(child[1])]
    if isinstance(module, LISTS):
        return _alike(blocks, LEAST) or _alike([c for c in children if _is_single(c[1])], LEAST_SINGLE)
    stems = {name: match[1] for name, _ in blocks if (match := _NUMBERED.fullmatch(name))}
    groups = ([child for child in blocks if stems.get(child[0]) == stem] for stem in dict.fromkeys(stems.values()))
    return [child for group in groups for child in _alike(group, LEAST_NUMBERED)]


def _alike(children: Children, least: int) -> Children:
    """Those children that have the structure of at least `least` of them, themselves included."""
    if len(children) < least:
        return []
    kinds = {type(child) for _, child in children}
    trees = {name: kinds if len(kinds) == 1 else _tree(child) for name, child in children}
    return [
        (name, child)
        for name, child in children
        if sum(type(child) is type(other) or trees[name] == trees[key] for key, other in children) >= least
    ]


def _tree(module: nn.Module) -> tuple:
    """The classes of all parts of a module, with their names in it."""
    return tuple((name, type(child).__qualname__, _tree(child)) for name, child in module.named_children())


def _is_block(module: nn.Module) -> bool:
    return not is_container(module) and sum(1 for _ in _kernels(module)) > 1


def _is_single(module: nn.Module) -> bool:
    """Whether a module is a layer with weights together with what belongs to it, such as its normalisation."""
    has_parts = not is_container(module) and any(True for _ in module.children())
    return has_parts and sum(1 for _ in _kernels(module)) == 1


def _kernels(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with weights in a module; layers that stay dense count, too."""
    return filter(_has_kernel, module.modules())


def _has_kernel(module: nn.Module) -> bool:
    if has_inputs(module) or isinstance(module, _KERNELS):
        return True
    if kind_of(module) == EMBEDDING or type(module).__module__.startswith("torch.nn."):
        return False
    # A layer of the user's own, or one that holds the weights of several experts.
    return any(sum(size > 1 for size in value.shape) > 1 for value in module.parameters(recurse=False))


def _is_sequence(module: nn.Module) -> bool:
    """Whether all parts are blocks of one class, and the outputs of each may be the inputs of the next."""
    children = list(module.children())
    if len(children) < 2 or len({type(child) for child in children}) > 1 or not all(map(_is_block, children)):
        return False
    widths = [_widths(child) for child in children]
    return all(outputs & inputs for (_, outputs), (inputs, _) in pairwise(widths))


def _widths(module: nn.Module) -> tuple[set[int], set[int]]:
    """The numbers of input and output channels of the layers in a module."""
    inputs: set[int] = set()
    outputs: set[int] = set()
    for kernel in _kernels(module):
        taken = next((getattr(kernel, key) for key in ("in_features", "in_channels", "nx") if hasattr(kernel, key)), 0)
        given = next(
            (getattr(kernel, key) for key in ("out_features", "out_channels", "nf") if hasattr(kernel, key)), 0
        )
        sizes = {size for value in kernel.parameters(recurse=False) for size in value.shape}
        inputs |= {taken} if taken else sizes
        outputs |= {given} if given else sizes
    return inputs, outputs


def _has_router(inside: dict[str, nn.Module], name: str) -> bool:
    """Whether a matrix beside the list `name` has an output for each of its parts: it chooses among experts."""
    parent, _, own = name.rpartition(".")
    count = sum(1 for _ in inside[name].children())
    if not name:
        return False
    beside = [part for key, child in inside[parent].named_children() if key != own for part in child.modules()]
    matrices = [value for part in (inside[parent], *beside) for value in part.parameters(recurse=False)]
    return any(value.ndim == 2 and value.shape[0] == count and math.prod(value.shape) > count for value in matrices)
