"""The wanted outputs of a compressed network's layers: the rows that the reference returns for the same images."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from tspc.calibration.gathering import gather, is_narrow, megabytes, moments_of, positions_of, with_the_same_rows
from tspc.calibration.moments import Moments
from tspc.calibration.patches import input_patches, output_rows
from tspc.calibration.samples import Samples
from tspc.errors import TspcWarning, some
from tspc.layers.dense import DenseLayer, kernel_of
from tspc.system.parallel import in_parts
from tspc.traversal.regular import is_regular
from tspc.traversal.stash import Stash
from tspc.traversal.tracing import Trace
from tspc.traversal.walk import Walker


@dataclass(frozen=True)
class _Call:
    """A call of a layer in the reference: the number of the batch, and the shapes of its whole input and output."""

    batch: int
    inputs: torch.Size
    outputs: torch.Size


@dataclass(frozen=True)
class Targets:
    """The output rows of one layer in the reference: a value for every call.

    The positions of the rows are those of the layer `first`, which has the same rows of inputs.
    """

    first: str
    rows: Stash
    calls: list[_Call] = field(default_factory=list)

    @property
    def inputs(self) -> list[tuple[int, torch.Size]]:
        """For every call the number of the batch, and the shape of the input."""
        return [(call.batch, call.inputs) for call in self.calls]

    def is_routed(self, samples: Samples) -> bool:
        """Whether the network decides by the images which of them reach the layer, as in a mixture of experts."""
        found: dict[int, list[torch.Size]] = {number: [] for number in range(len(samples.kept))}
        for call in self.calls:
            found[call.batch].append(call.outputs)
        shapes, sizes = [tuple(each) for each in found.values()], [samples.kept.shapes(number) for number in found]
        return not is_regular(shapes, sizes)


def targets_of(reference: Walker, layers: Collection[str], samples: Samples) -> dict[str, Targets]:
    """The outputs of each layer in the reference's present segment; the segment is then finished."""
    firsts = with_the_same_rows(reference.model, reference.trace, layers)
    targets = {name: Targets(firsts[name], Stash(samples.room)) for name in layers}

    def see(name: str, batch: int, inputs: Tensor, outputs: Tensor) -> None:
        layer = _dense(reference, name)
        positions = positions_of(layer, firsts[name], batch, outputs.shape, samples)
        # A later operation may change the output in place.
        targets[name].rows.append(output_rows(layer, outputs, positions).clone())
        targets[name].calls.append(_Call(batch, inputs.shape, outputs.shape))

    reference.calls_of(layers, see, for_the_last_time=True)
    return targets


def moments_towards(targets: Mapping[str, Targets], small: Walker, samples: Samples) -> dict[str, Moments]:
    """Moments of some layers' inputs in the compressed network, with the reference's rows as targets.

    All of them have the same input, which is seen where the first one is called. In `small` they are still the
    reference's own. The result is empty if other images come there, so that the rows do not belong together.
    """
    if any(of.is_routed(samples) for of in targets.values()):
        return {}
    head, layers = next(iter(targets)), {name: _dense(small, name) for name in targets}
    expected = targets[head].inputs
    by_rows: dict[str, list[str]] = {}
    for name, of in targets.items():
        by_rows.setdefault(of.first, []).append(name)
    moments: dict[str, Moments] = {}
    seen: list[tuple[int, torch.Size]] = []

    def see(name: str, batch: int, inputs: Tensor) -> None:
        number = len(seen)
        seen.append((batch, inputs.shape))
        if seen[number:] != expected[number : number + 1]:
            return
        for first, (own, *others) in by_rows.items():
            positions = positions_of(layers[own], first, batch, targets[own].calls[number].outputs, samples)
            x = input_patches(layers[own], inputs, positions)
            if own not in moments:
                moments[own] = Moments(x.shape[-1], len(kernel_of(layers[own])), x.device, len(x))
                moments.update({one: moments[own].beside(len(kernel_of(layers[one]))) for one in others})
            beside = [(moments[one], targets[one].rows[number]) for one in others]
            weights = samples.weights.at(small.trace.sharing(own), batch, positions, x.shape[1])
            moments[own].add(x, targets[own].rows[number], beside, weights)

    small.inputs_of([head], see)
    return moments if seen == expected else {}


def _dense(walker: Walker, name: str) -> DenseLayer:
    return cast(DenseLayer, walker.model.get_submodule(name))


def _with_the_input_of(
    name: str, targets: Mapping[str, Targets], reference: Walker, samples: Samples
) -> dict[str, Targets]:
    """The targets of a layer and of others with the same input, as many as fit into memory together.

    No layer before them feeds only some of them, so one pass is enough for all.
    """
    same, calls = reference.trace.same_input, targets[name].inputs
    group = [one for one, of in targets.items() if same[one] == same[name] and of.inputs == calls]
    size = lambda one: megabytes(reference.model, one)  # noqa: E731
    return {one: targets[one] for one in next(in_parts(group, size, samples.settings.memory))}


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
                    group = _with_the_input_of(name, targets, reference, samples)
                    found = moments_towards(group, small, samples)
                    for one, of in group.items():
                        seen[one] = found.get(one)
                        of.rows.clear()
                        del targets[one]
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
