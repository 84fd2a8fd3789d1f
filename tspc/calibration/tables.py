"""What the inputs show of tables of embeddings: how often each token comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tspc.calibration.samples import Samples, Survey
from tspc.calibration.sketches import Sketch
from tspc.decompositions import Metric
from tspc.layers.dense import kernel_of
from tspc.traversal.hooks import Reached, first_argument, run_on, running

UNSEEN = 1
"""Added to the count of every token, because calibration shows only some of them."""


@torch.no_grad()
def tables_of(
    model: nn.Module, tables: Collection[str], samples: Samples, survey: Survey
) -> Iterator[tuple[str, Sketch]]:
    """For each table that the network looks rows up in, the norm of an error D (tokens × length) of its rows.

    A table is a dense layer whose input is 1 at the token and 0 elsewhere. The second moments of such inputs have the
    frequencies p of the tokens on their diagonal, and 0 elsewhere. So the squared error is Σ p·dᵀGd over the rows d of
    D, where G is the sensitivity of the outputs. It has the units of the other layers' errors. In the norm p stands for
    the outputs and G for the inputs, because a table has its tokens in the first axis.
    """
    for name, counts in _counts(model, tables, samples).items():
        kernel = kernel_of(model.get_submodule(name)).detach().float()
        frequencies = (counts + UNSEEN).to(kernel)
        weights = survey.weights(name)
        weights = torch.ones_like(kernel[0]) if weights is None else weights.to(kernel)
        moments = weights.diag() if weights.ndim == 1 else weights
        yield name, Sketch(kernel, Metric(moments, frequencies / frequencies.sum()))


def _counts(model: nn.Module, tables: Collection[str], samples: Samples) -> dict[str, Tensor]:
    """How often each row of a table is looked up; tables that are never called are left out."""
    found: dict[str, Tensor] = {}
    calls, expected = 0, None

    def hook(name: str, masks: list[Tensor]) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any, outputs: Tensor) -> None:
            nonlocal calls
            size = len(kernel_of(module))
            tokens = first_argument(args, kwargs)
            mask = next((mask for mask in masks if mask.shape == tokens.shape), None)
            counts = torch.bincount(tokens.flatten() if mask is None else tokens[mask], minlength=size)
            found[name] = found[name] + counts if name in found else counts
            calls += 1
            if calls == expected:  # the rest of the network shows nothing more
                raise Reached

        return see

    for number, batch in enumerate(samples if tables else ()):
        calls = 0
        see = {name: hook(name, samples.kept.masks(number)) for name in tables}
        handles = [model.get_submodule(name).register_forward_hook(see[name], with_kwargs=True) for name in tables]
        with running(number, samples.short):
            run_on(model, handles, batch)
        expected = expected or calls or None
    return found
