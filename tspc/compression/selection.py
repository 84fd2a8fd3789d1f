"""Which layers of a network can be tensorized, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tspc.compression.beside import has_narrow_bias
from tspc.compression.beside_rows import LOOKED_UP, own_parameters
from tspc.compression.form import PLAIN, Widths
from tspc.compression.plan import FINAL, PARAMETERS, TABLE, LayerPlan
from tspc.compression.settings import Selection
from tspc.errors import ConfigError, some
from tspc.layers.dense import is_table, kernel_shape, kind_of
from tspc.layers.forms import tensorized_layers
from tspc.layers.ties import partners_of
from tspc.layers.unpacking import parts_of
from tspc.models.lazy import require_sizes
from tspc.quantization.grids import LONG_ROW
from tspc.traversal.hooks import evaluating

FilterFn = Callable[[str, nn.Module], bool]
"""Whether a layer, given by its name and itself, may be tensorized."""


FIRST = "first convolution"
DEPTHWISE, SHARED, FOLLOWS = "depthwise convolution", "its weight is shared with ", "; both change together"
EXCLUDED, NOT_INCLUDED, FILTERED = "excluded", "not included", "left out by filter_fn"
SHORT_ROWS = f"rows of fewer than {LONG_ROW} numbers"
"""Why a table of embeddings takes no part in any budget."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of numbers in which a kernel can be decomposed."""


def select(
    model: nn.Module,
    selection: Selection,
    filter_fn: FilterFn | None = None,
    widths: Widths = PLAIN,
    ranks_tables: bool | None = None,
) -> list[LayerPlan]:
    """A row for every convolution and dense layer, still dense; `reason` says which rule keeps it dense, or is None.

    A parameter that several modules share counts in the first of them.

    With `widths` below 32 bits there is a row for every table of embeddings, too, and with 32 bits for those that may
    have a low rank: with `ranks_tables` all, and if it is None those that the selection includes by name. The last rule
    is `filter_fn`: it is called for layers that no other rule keeps dense, and those for which it is false stay dense.
    With fewer than 32 bits it is called for all layers that are not shared or left out by name. Raises ConfigError if
    the network is compressed already, or a wildcard matches nothing.
    """
    require_sizes(model)
    done = next(iter(tensorized_layers(model)), None)
    if done is not None:
        raise ConfigError([f"the network is compressed already (layer {done}); give the original one"])
    with evaluating(model):  # in training mode, reading a weight of spectral norm changes it
        known = nn.Linear | nn.Embedding | _ConvNd
        everything = {n: m for n, m in model.named_modules() if isinstance(m, known) or kind_of(m)}
        tables = {name for name, module in everything.items() if isinstance(module, nn.Embedding)}
        ranked = _ranked(tables, selection, ranks_tables)
        modules = {n: m for n, m in everything.items() if widths.offers_dense or n not in tables - ranked}
        shapes = {name: kernel_shape(module) for name, module in modules.items()}
    shared, followers = _shared_weights(model), set[str]()
    ties = _ties(model, tables if widths.offers_dense else ranked, selection, filter_fn)
    first = next((n for n, m in modules.items() if isinstance(m, _ConvNd)), None)
    parts = parts_of(model)  # the final classifier is none of them
    last = next((name for name in reversed(modules) if name not in tables and name not in parts), None)
    beside = parameters_beside(model).values() if widths.offers_dense else ()
    allowed = {*everything, *(name for names in beside for name in names)}
    for key, patterns, names in (
        ("include", selection.include, everything),
        ("exclude", selection.exclude, allowed),
    ):
        idle = [pattern for pattern in patterns if not matches(names, [pattern])]
        if idle:
            raise ConfigError(
                [f"{key}={idle}: no convolution or dense layer has such a name; there are {some(modules)}"]
            )
    layers, own = [], own_parameters(model)
    for name, module in modules.items():
        reason = why_dense(module)
        if reason is None and name in tables - ranked and widths.unit == PARAMETERS:
            reason = LOOKED_UP
        params = sum(p.numel() for p in module.parameters(recurse=False))
        is_whole, is_small = name in tables - ranked, params < selection.min_params
        is_end = (selection.keep_first and name == first) or (selection.keep_last and name == last and reason is None)
        if name in shared and name not in ties:
            reason = f"{SHARED}{shared[name]}{FOLLOWS if name in followers else ''}"
            params = sum(p.numel() for p in own[name].values())
        elif matches([name], selection.exclude):
            reason = EXCLUDED
        elif selection.include and not matches([name], selection.include) and (widths.offers_dense or not is_end):
            reason = NOT_INCLUDED  # in float32 the last layer may still correct the errors of the others
        elif widths.offers_dense and filter_fn is not None and not filter_fn(name, module):
            reason = FILTERED  # asked first, because in few bits also layers that other rules keep dense change
        elif is_end:
            # Where the budget decides the widths, it decides theirs, too.
            is_whole = reason is None and widths.is_choice and not is_small
            reason = None if is_whole else FIRST if name == first else FINAL
        elif reason is None and is_small:
            reason = f"fewer than {selection.min_params:,} parameters"
        elif reason is None and filter_fn is not None and not filter_fn(name, module):
            reason = FILTERED
        if name in ties and not is_untouched(reason):
            followers |= set(ties[name])
        entry = next((p.element_size() for p in module.parameters(recurse=False)), 4)
        kind = TABLE if name in tables else type(module).__name__
        numbers = {"entry_bytes": entry, "has_narrow_bias": has_narrow_bias(module), "is_whole": is_whole}
        layers.append(LayerPlan(name, kind, shapes[name], params, params, reason=reason, **numbers))
    return layers


def _ranked(tables: set[str], selection: Selection, ranks_tables: bool | None) -> set[str]:
    """The tables that may have a low rank."""
    if ranks_tables is None:
        return {name for name in tables if matches([name], selection.include)}
    return tables if ranks_tables else set()


def _ties(
    model: nn.Module, tables: set[str], selection: Selection, filter_fn: FilterFn | None
) -> dict[str, tuple[str, ...]]:
    """Those of the tables that change together with the layers that share their weight, and these layers.

    A table that is included includes them.
    """

    def can_change(name: str) -> bool:
        layer = model.get_submodule(name)
        is_left_out = matches([name], selection.exclude) or (filter_fn is not None and not filter_fn(name, layer))
        return not is_left_out and why_dense(layer) is None

    ties = ((name, partners) for name, partners in partners_of(model).items() if name in tables)
    return {name: partners for name, partners in ties if all(map(can_change, partners))}


def parameters_beside(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The parameters that no convolution, dense layer or table of a known kind has: for each its name and its module's.

    Both are names by which the user may leave it out.
    """
    known = {id(x) for module in model.modules() if kind_of(module) for x in module.parameters(recurse=False)}
    names = (name for name, x in model.named_parameters(remove_duplicate=False) if id(x) not in known)
    return {name: (name, name.rpartition(".")[0]) for name in names}


def matches(names: Iterable[str], patterns: Collection[str]) -> bool:
    """Whether a wildcard matches a name."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def why_dense(module: nn.Module) -> str | None:
    """Why a module cannot be tensorized, whatever its place in the network; None if it can."""
    if kind_of(module) is None:
        return f"{type(module).__name__} is not supported"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters"
    if module.weight.dtype not in DTYPES:
        return f"its weight has numbers of the type {str(module.weight.dtype).removeprefix('torch.')}"
    if module._buffers or module._modules or set(module._parameters) - {"weight", "bias"}:
        return "it holds parameters, buffers or modules of its own"
    if is_table(module):
        return _why_no_table(module)
    if isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels:
        return DEPTHWISE
    return None


def _why_no_table(table: nn.Module) -> str | None:
    """Why a table of embeddings cannot have fewer bits; None if it can."""
    if table.max_norm is not None:
        return "max_norm changes its rows when it is called"
    if table.sparse:
        return "its gradients are sparse"
    return SHORT_ROWS if kernel_shape(table)[1] < LONG_ROW else None


def is_untouched(reason: str | None) -> bool:
    """Whether a layer keeps its kernel as it is for this reason, also where other dense layers have fewer bits."""
    return reason in (EXCLUDED, NOT_INCLUDED, FILTERED) or (reason or "").startswith(SHARED)


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """For each module that holds a parameter of another one the name of the other, or its second name."""
    owners: dict[int, dict[str, None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[name] = None
    shared: dict[str, str] = {}
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            shared.setdefault(name, next(other for other in names if other != name))
    return shared
