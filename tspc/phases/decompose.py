"""Phase 0: dense layers out, tensorized layers in."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from tspc.compression import apply_
from tspc.phases.context import Context
from tspc.plans import LayerPlan, Plan


@dataclass(frozen=True)
class Selection:
    """Which layers stay dense: the first convolution, the last layer, names that match wildcards in `exclude`."""

    keep_first: bool = True
    keep_last: bool = True
    exclude: tuple[str, ...] = ()


def decompose(reference: nn.Module, plan: Plan, context: Context) -> tuple[nn.Module, Plan]:
    """A tensorized copy of `reference`, and the plan with the error of each layer."""
    model = copy.deepcopy(reference)
    total = len(plan.tensorized)
    with context.display.bar(f"{'decompose':<9} {total} layers", total) as bar:
        done = 0

        def on_layer(layer: LayerPlan) -> None:
            nonlocal done
            done += 1
            bar.advance(done, f"{layer.name}  error {layer.error:.3f}")
            context.note({"phase": "decompose", "layer": layer.name, "error": layer.error, "parameters": layer.params})

        plan = apply_(model, plan, on_layer)
    return model.eval(), plan
