"""The wanted outputs of a compressed network's layers: the rows that the reference returns for the same images."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from tspc.calibration.moments import Moments
from tspc.calibration.patches import input_patches, output_rows
from tspc.calibration.samples import Samples, gather, is_narrow, megabytes, moments_of, positions_of
from tspc.errors import TspcWarning, some
from tspc.layers.dense import DenseLayer, kernel_of
from tspc.system.parallel import in_parts
from tspc.traversal.stash import Stash
from tspc.traversal.tracing import Trace
from tspc.traversal.walk import Walker


@dataclass(frozen=True)
class Targets:
    """The output rows of one layer in the reference: a value for every call.

    `calls` has, for each call, the number of the batch and the shape of the whole output.
    """

    rows: Stash
    calls: list[tuple[int, torch.Size]] = field(default_factory=list)

    def is_routed(self, samples: Samples) -> bool:
        """Whether the network decides by the images which of them reach the layer, as in a mixture of experts."""
        whole = range(len(samples) // samples.settings.batch_size)  # the last batch may be smaller
        shapes = [[shape for batch, shape in self.calls if batch == number] for number in whole]
        return any(found != shapes[0] for found in shapes)


def targets_of(reference: Walker, layers: Collection[str], samples: Samples) -> dict[str, Targets]:
    """The outputs of each layer in the reference's present segment; the segment is then finished."""
    targets = {name: Targets(Stash(samples.room)) for name in layers}

    def see(name: str, batch: int, inputs: Tensor, outputs: Tensor) -> None:
        layer = cast(DenseLayer, reference.model.get_submodule(name))
        rows = output_rows(layer, outputs, positions_of(layer, name, batch, outputs, samples))
        targets[name].rows.append(rows.clone())  # a later operation may change the output in place
        targets[name].calls.append((batch, outputs.shape))

    for _ in reference.inputs_of(layers, see, for_the_last_time=True):
        pass
    return targets


def moments_towards(targets: Mapping[str, Targets], small: Walker, samples: Samples) -> dict[str, Moments]:
    """Moments of some layers' inputs in the compressed network, with the reference's rows as targets.

    The layers in `small` are still the reference's own. A layer is left out if it gets other images there, so that its
    rows do not correspond to the reference's rows.
    """
    targets = {name: of for name, of in targets.items() if not of.is_routed(samples)}
    moments: dict[str, Moments] = {}
    calls: dict[str, list[tuple[int, torch.Size]]] = {name: [] for name in targets}

    def see(name: str, batch: int, inputs: Tensor, outputs: Tensor) -> None:
        layer, number = cast(DenseLayer, small.model.get_submodule(name)), len(calls[name])
        calls[name].append((batch, outputs.shape))
        if calls[name][number:] != targets[name].calls[number : number + 1]:
            return
        x = input_patches(layer, inputs, positions_of(layer, name, batch, outputs, samples))
        if name not in moments:
            moments[name] = Moments(x.shape[-1], len(kernel_of(layer)), x.device, len(x))
        moments[name].add(x, targets[name].rows[number])

    for _ in small.inputs_of(targets, see) if targets else ():
        pass
    return {name: found for name, found in moments.items() if calls[name] == targets[name].calls}


def moments_in_turn(
    model: nn.Module, work: nn.Module, layers: Collection[str], samples: Samples, trace: Trace
) -> Iterator[tuple[str, Moments]]:
    """Moments of the layers' inputs in `work`, layer by layer in the order of the calls.

    The caller replaces each layer in `work` before it asks for the next one. The targets are the outputs of the layers
    in `model`, the reference. Without compensation the inputs are those in the reference, too.
    """
    if not samples.settings.compensate:
        yield from moments_of(model, layers, samples, trace)
        return
    reference, small = samples.walk(model, trace), samples.walk(work, trace)
    routed: list[str] = []
    try:
        for segment in trace.segments:
            reference.advance()
            small.advance()
            inside = [name for name in segment.layers if name in layers and is_narrow(model.get_submodule(name))]
            targets = targets_of(reference, inside, samples) if inside else {}
            seen: dict[str, Moments | None] = {}
            for name in inside:
                if name not in seen:
                    # No layer before them feeds those with the same input, so one pass is enough for all.
                    group = [other for other in targets if trace.same_input[other] == trace.same_input[name]]
                    group = next(in_parts(group, lambda one: megabytes(model, one), samples.settings.memory))
                    found = moments_towards({one: targets[one] for one in group}, small, samples)
                    seen |= {one: found.get(one) for one in group}
                    for one in group:
                        targets.pop(one).rows.clear()
                moments = seen.pop(name)
                if moments is None:
                    routed.append(name)
                    moments = gather(small, [name], samples).get(name)
                if moments is not None:
                    yield name, moments
                del moments  # given away, so that its memory can be freed
    finally:
        reference.close()
        small.close()
    if routed:
        message = (
            f"other layers decide which images reach {some(routed)}, as in a mixture of experts: "
            "these layers are fitted to their own kernels, and do not correct the errors of the layers before them"
        )
        warnings.warn(message, TspcWarning, stacklevel=2)
