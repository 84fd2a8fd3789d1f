"""Layers whose factors are not those in which they learn best: `id` learns as `svd`, and is `id` again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import nn

from tspc.decompositions import Decomposition
from tspc.layers.forms import Contracted, tensorized_layers
from tspc.quantization.grids import FULL

F = TypeVar("F", bound=Callable[..., Any])


def for_training_(model: nn.Module) -> dict[str, Decomposition]:
    """Gives layers the factors in which they learn best; returns the method that each of these layers had.

    The network computes the same. Layers in few bits keep their factors, which are on grids.
    """
    found: dict[str, Decomposition] = {}
    for name, layer in tensorized_layers(model).items():
        if not isinstance(layer, Contracted) or layer.bits != FULL:
            continue
        method, factors = layer.decomposition.for_training(layer.factors())
        if method != layer.decomposition:
            found[name] = layer.decomposition
            layer.take_(method, factors)
    return found


def after_training_(model: nn.Module, methods: dict[str, Decomposition]) -> None:
    """The inverse of `for_training_`."""
    layers = tensorized_layers(model)
    for name, method in methods.items():
        layer = layers[name]
        assert isinstance(layer, Contracted)
        tensors = layer.decomposition.tensors_of(layer.factors())
        layer.take_(method, method.as_factors([x.detach() for x in tensors], layer.shape, layer.rank))


def with_learning_factors(train: F) -> F:
    """The same function of a network, which meanwhile has the factors in which it learns best."""

    @wraps(train)
    def trained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        methods = for_training_(model)
        try:
            return train(model, *args, **kwargs)
        finally:
            after_training_(model, methods)

    return cast(F, trained)
