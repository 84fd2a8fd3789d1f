"""Tables of embeddings whose weight other layers share, such as the output layer: one pair of factors serves all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from tspc.layers.dense import DenseLayer, is_table, kind_of
from tspc.layers.forms import untrained
from tspc.layers.tensorized import TensorizedLayer, scales_of


def partners_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each table whose weight is shared: the other tables and dense layers with this weight, all after it.

    A table in several places of the network has none of them. Tables that share with anything else are left out.
    """
    places: dict[int, dict[str, nn.Module]] = {}
    shared: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        for parameter in module.parameters(recurse=False):
            owners = places.setdefault(id(parameter), {})
            if owners:
                shared.add(id(parameter))
            if module not in owners.values():
                # Where another parameter is the shared one, there is no partner.
                owners[name] = module if parameter is weight else nn.Module()
    found: dict[str, tuple[str, ...]] = {}
    for key in shared:
        (name, table), *others = places[key].items()
        if is_table(table) and all(kind_of(module) == "linear" or is_table(module) for _, module in others):
            found[name] = tuple(other for other, _ in others)
    return found


def with_partners(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The new layers of `model`, and new ones for the layers that share the weights of its tables.

    The latter share the factors of the new tables.
    """
    partners = partners_of(model) if any(is_table(model.get_submodule(name)) for name in layers) else {}
    found = dict(layers)
    for name, layer in layers.items():
        for partner in partners.get(name, ()) if isinstance(layer, TensorizedLayer) else ():
            table, dense = cast(TensorizedLayer, layer), cast(DenseLayer, model.get_submodule(partner))
            made = untrained(dense, table.decomposition, table.rank, bits=table.bits)
            tie_(made, dense, table)
            found[partner] = made.train(dense.training)
    return found


def tie_loaded_(model: nn.Module, layers: dict[str, TensorizedLayer]) -> None:
    """Ties the new layers of a dense network, which are not yet in it, as their weights are tied in it."""
    for name, partners in partners_of(model).items():
        for partner in partners:
            if name in layers and partner in layers and _have_same_factors(layers[name], layers[partner]):
                tie_(layers[partner], model.get_submodule(partner), layers[name])


def tie_(layer: TensorizedLayer, dense: nn.Module, table: TensorizedLayer) -> None:
    """Gives a layer the factors of a table, on the same grids, and the bias of the dense layer, which may be shared."""
    for own, shared in zip(layer.factor_parameters(), table.factor_parameters(), strict=True):
        _replace_(layer, own, shared)
    for i in range(len(table.grids)):
        layer.register_buffer(scales_of(i), table.get_buffer(scales_of(i)))
    share_bias_(layer, dense)
    layer.forget()


def share_bias_(layer: TensorizedLayer, dense: nn.Module) -> None:
    """Gives a layer the bias of the dense layer itself, which other modules may share."""
    if layer.bias is not None:
        _replace_(layer, cast(nn.Parameter, layer.bias), cast(nn.Parameter, dense.bias))


def forget_ties_(model: nn.Module) -> None:
    """Lets `tie_weights` of transformers leave tensorized layers alone: they are tied by their factors."""
    for module in model.modules():
        for key in ("_tied_weights_keys", "all_tied_weights_keys"):
            pairs = getattr(module, key, None)
            if isinstance(pairs, dict):
                left = {a: b for a, b in pairs.items() if not any(_is_tensorized(module, x) for x in (a, b))}
                if len(left) < len(pairs):
                    setattr(module, key, left)


def _is_tensorized(model: nn.Module, weight: str) -> bool:
    try:
        return isinstance(model.get_submodule(weight.rpartition(".")[0]), TensorizedLayer)
    except AttributeError:
        return False


def _have_same_factors(one: TensorizedLayer, other: TensorizedLayer) -> bool:
    shapes = [[tuple(factor.shape) for factor in layer.factor_parameters()] for layer in (one, other)]
    return one.decomposition == other.decomposition and shapes[0] == shapes[1] and one.bits == other.bits


def _replace_(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for inner in module.modules():
        for key, value in inner._parameters.items():
            if value is old:
                inner._parameters[key] = new
