"""What the inputs show of tables of embeddings: how often each token comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.samples import Samples, Survey
from tspc.calibration.sketches import Sketch
from tspc.decompositions import Metric
from tspc.layers.dense import has_inputs, kernel_of
from tspc.layers.ties import partners_of
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

    If the table's weight is also that of output layers, their squared errors are added: Σ g·dᵀE[hhᵀ]d, with the inputs
    h of the layer and the sensitivities g of its outputs. The sum of the two norms becomes one of the same form: the
    sum of their inputs, and the mean of their outputs by what each tells of the kernel. Where the sensitivity of the
    output layer is not known, a relative error counts as much there as in the table.
    """
    heads = heads_of(model, tables)
    counted, moments_of_heads = _counts(model, tables, heads, samples)
    for name, counts in counted.items():
        kernel = kernel_of(model.get_submodule(name)).detach().float()
        frequencies = (counts + UNSEEN).to(kernel)
        weights = survey.weights(name)
        weights = torch.ones_like(kernel[0]) if weights is None else weights.to(kernel)
        metric = Metric(weights.diag() if weights.ndim == 1 else weights, frequencies / frequencies.sum())
        for head in (head for head, table in heads.items() if table == name and head in moments_of_heads):
            inputs, outputs = moments_of_heads[head].to(kernel), survey.weights(head)
            if outputs is None:
                metric = _mean(metric, Metric(inputs, metric.outputs), kernel)
            else:
                outputs = (outputs if outputs.ndim == 1 else outputs.diagonal()).to(kernel)
                metric = in_sum(metric, Metric(inputs, outputs), kernel)
        yield name, Sketch(kernel, metric)


def heads_of(model: nn.Module, tables: Collection[str]) -> dict[str, str]:
    """The dense layers that share the weights of tables, with the names of the tables."""
    ties = partners_of(model) if tables else {}
    pairs = {partner: table for table in tables for partner in ties.get(table, ())}
    return {partner: table for partner, table in pairs.items() if has_inputs(model.get_submodule(partner))}


def _mean(one: Metric, other: Metric, kernel: Tensor) -> Metric:
    """A norm in which relative errors in both count the same, and the kernel is as large as in the first."""
    sizes = one.squared(kernel), other.squared(kernel)
    if min(sizes) <= 0:
        return one
    of_rows, of_heads = (cast(Tensor, metric.inputs) for metric in (one, other))
    return Metric((of_rows + of_heads * (sizes[0] / sizes[1])) / 2, one.outputs)


def in_sum(one: Metric, other: Metric, kernel: Tensor) -> Metric:
    """A norm whose square is about the sum of both squares, and that for the kernel itself. Outputs are diagonals."""
    sizes = one.squared(kernel), other.squared(kernel)
    if min(sizes) <= 0:
        return one if sizes[0] > 0 else other
    totals = [cast(Tensor, metric.outputs).sum() for metric in (one, other)]
    of_rows, of_heads = (cast(Tensor, m.inputs) * total for m, total in zip((one, other), totals, strict=True))
    parts = [
        size / sum(sizes) * cast(Tensor, m.outputs) / t for size, m, t in zip(sizes, (one, other), totals, strict=True)
    ]
    found = Metric(of_rows + of_heads, parts[0] + parts[1])
    return Metric(cast(Tensor, found.inputs) * (sum(sizes) / found.squared(kernel)), found.outputs)


def _counts(
    model: nn.Module, tables: Collection[str], heads: Collection[str], samples: Samples
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How often each row of a table is looked up, and E[hhᵀ] of the inputs of `heads`; without those never called.

    Padded positions do not count.
    """
    found: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    rows_of: dict[str, int] = {}
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
            if calls == expected and not heads:  # the rest of the network shows nothing more
                raise Reached

        return see

    def head(name: str, masks: list[Tensor]) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = first_argument(args, kwargs)
            mask = next((mask for mask in masks if mask.shape == given.shape[:-1]), None)
            rows = (given.flatten(0, -2) if mask is None else given[mask]).float()
            moments[name] = moments.get(name, 0) + rows.T @ rows
            rows_of[name] = rows_of.get(name, 0) + len(rows)

        return see

    for number, batch in enumerate(samples if tables else ()):
        calls = 0
        see = {name: hook(name, samples.kept.masks(number, name)) for name in tables}
        handles = [model.get_submodule(name).register_forward_hook(see[name], with_kwargs=True) for name in tables]
        seen_by = {name: head(name, samples.kept.masks(number, name)) for name in heads}
        handles += [model.get_submodule(n).register_forward_pre_hook(seen_by[n], with_kwargs=True) for n in heads]
        with running(number, samples.short):
            run_on(model, handles, batch)
        expected = expected or calls or None
    return found, {name: total / max(1, rows_of[name]) for name, total in moments.items()}
