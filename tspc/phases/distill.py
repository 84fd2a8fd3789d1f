"""Phase 1: block after block learns to reproduce the reference network's activations (arXiv:1805.10352, section 5).

The paper's code runs both whole networks for every step of every block. Here the inputs and targets of a block are
computed once, before it is trained, and kept. A step then costs one forward and backward pass of the block.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tspc.calibration import Calibration
from tspc.compression.beside import narrow_beside_, wide_parameters
from tspc.compression.fits import OnLayer
from tspc.compression.integers import on_grids
from tspc.compression.progress import FIT, work_on
from tspc.compression.rounding import put_on_grids_, take_off_grids_
from tspc.data import Given, at_once, filled, kinds_of
from tspc.errors import TspcWarning
from tspc.layers.forms import tensorized_layers
from tspc.layers.learning import with_learning_factors
from tspc.layers.unpacking import with_like_parts
from tspc.phases.activations import Kept, Masked, augmented_images
from tspc.phases.agreement import keep_better_, keep_closer_
from tspc.phases.batch_norm import SHOWN, count_norms, rebase_, refit_norms_
from tspc.phases.context import Context
from tspc.phases.finetune import relative_error
from tspc.phases.phase import NetworkPhase, Work
from tspc.phases.planning import calibration_samples
from tspc.phases.refit import adapted_layers, can_be_refitted, refit_
from tspc.system import processes
from tspc.system.bounds import COUNT, NONE_OR_MORE, SHARE_BELOW_ONE, out_of_range
from tspc.system.modes import own_modes
from tspc.system.tally import counting
from tspc.training import Progress, Recipe, Step, Watchers, fit
from tspc.traversal.blocks import block_of, find_blocks
from tspc.traversal.hooks import evaluating
from tspc.traversal.stash import Room
from tspc.traversal.tracing import Trace, trace

BATCH_NORMS = ("frozen", "updated")
WAYS = ("sequential", "parallel", "mixed")
FEW_NORMS = 8
"""Up to this number of batch norms in a block, each is solved with all images that are shown."""


@dataclass(frozen=True)
class Distillation(Recipe):
    """A recipe for every block. `blocks` is a wildcard over module names; None finds them in the module tree.

    `images` augmented training images (at most four views of each) go through both networks. The activations at the
    block are kept: in float16 if that can hold them, and beyond `memory` MB in temporary files. `inputs` says where a
    block's inputs come from: the compressed blocks before it (`sequential`, as in the paper), the reference's blocks
    (`parallel`), or both in turn (`mixed`). A block is done when its loss falls by less than the share `least_gain`
    over ten steps; with 0 it takes all steps. `held_out` training images are not trained on; they judge the network.

    `batch_norm` says which statistics the batch norms under training use: their running statistics, as the reference
    does (`frozen`), or those of the batch, which also update the running statistics (`updated`).
    """

    blocks: str | None = None
    batch_norm: str = "updated"
    inputs: str = "sequential"
    images: int = 4096
    memory: int = 1024
    least_gain: float = 0.02
    optimizer: str = "adam"
    schedule: str = "constant"
    held_out: int = 1000
    evaluations: int = 4
    # These are no settings: the loss of a block has no labels, and its batch is never too large.
    label_smoothing: float = field(default=0.0, init=False)
    accumulate: int = field(default=1, init=False)

    def problems(self, where: str) -> list[str]:
        words = {"batch_norm": BATCH_NORMS, "inputs": WAYS}
        numbers = {"images": COUNT, "memory": NONE_OR_MORE, "least_gain": SHARE_BELOW_ONE}
        return super().problems(where) + out_of_range(self, where, words | numbers)


@own_modes(exact=False)
@with_like_parts
@with_learning_factors
def distill(
    model: nn.Module,
    reference: nn.Module,
    settings: Distillation,
    context: Context,
    progress: Progress,
    calibration: Calibration | None = None,
) -> None:
    """Trains the blocks of `model` in order, in place.

    A block here contains tensorized layers. A dense layer outside these blocks stays unchanged if it equals the
    reference's. If phase 0 changed it, to correct the errors of the layers before it, it is solved anew for its
    present inputs. If the two networks do not give a block the same rows (experts behind a router), the block is left
    unchanged, with a warning. A block never ends with a larger loss on the judging images. A network that classifies is
    set back if it gives the reference's class on fewer held-out images than before, by more than chance explains. This
    last check is left out if the blocks were named.

    Factors on grids are floating-point numbers meanwhile. At the end they are rounded again, with the images that
    `calibration` asks for (by default with its default): a few small steps seldom move a rounded entry to another value
    of its grid. The network is set back if its answers are then farther from the reference's than before.

    Raises TrainingError if a loss stops being finite, ConfigError if the pattern matches no block.
    """
    adapted, wide, start = adapted_layers(model, reference), wide_parameters(model), copy.deepcopy(model.state_dict())
    layers = tensorized_layers(model, tables=False)  # a table has no block before it to learn from
    blocks = find_blocks(reference, list(layers), settings.blocks)
    widths = take_off_grids_(model, lambda name: name in layers and block_of(name, blocks) is not None)
    progress.restore_(model)
    model.eval().requires_grad_(False)
    reference.eval()
    room = Room(settings.memory)
    try:
        images = augmented_images(settings, settings.images, context, room)
        # If blocks are named, nothing else is changed. With the reference's inputs its own layer is the best one.
        is_free = settings.blocks is None and settings.inputs != "parallel"
        found = _trace(reference, list(layers), blocks, adapted, kinds_of(images), is_free)
        kept = Kept(reference, model, found, images, room, settings.inputs, context.seed)
        for number, segment in enumerate(found.segments):
            kept.advance()
            if number >= progress.part:
                label = f"block {number + 1}/{len(found.segments)} {segment.module or 'whole network'}"
                if not kept.is_paired:
                    warnings.warn(
                        f"{segment.module} does not get the same rows in both networks (a router may choose them); "
                        "it is not distilled",
                        TspcWarning,
                        stacklevel=2,
                    )
                elif segment.module in adapted:
                    _solve(model, reference, segment.module, label, kept, settings, context)
                else:
                    _train_block(model, reference, segment.module, number, label, kept, settings, context, progress)
                progress.save(number + 1, {"network": model.state_dict()})
        if widths:
            _round_(model, reference, widths, wide, calibration or Calibration(), context)
            keep_closer_(model, start, reference, _unseen(kept, settings, context), context)
        elif on_grids(model):
            narrow_beside_(model, wide)
        if settings.blocks is None and not widths:
            keep_better_(model, start, reference, _unseen(kept, settings, context), context)
    finally:
        room.close()
    model.eval().requires_grad_(True)


def _round_(
    model: nn.Module,
    reference: nn.Module,
    widths: Mapping[str, int],
    wide: set[str],
    calibration: Calibration,
    context: Context,
) -> None:
    """Puts the factors on grids again; the parameters named in `wide` stay as they are."""
    sizes = {x: work_on(math.prod(layer.shape)) for x, layer in tensorized_layers(model).items() if x in widths}
    with (
        calibration_samples(calibration, context) as samples,
        context.tally("distill", f"rounding of {len(widths)} layers", FIT * sum(sizes.values())) as tally,
        counting(samples, tally),
    ):
        done: OnLayer = lambda layer, *fitted: tally.add(layer.name, FIT * sizes[layer.name])  # noqa: E731
        put_on_grids_(model, reference, widths, samples, done, kept=wide)


def _trace(
    reference: nn.Module, layers: list[str], blocks: list[str], adapted: list[str], kinds: list[Given], is_free: bool
) -> Trace:
    """The blocks, and if `is_free` the adapted layers outside them that can be solved anew; each is a segment.

    The reference is traced, because in the compressed network the factors of a layer would count as layers of a block.
    """
    few, *others = kinds
    found = trace(reference, layers + adapted, few, blocks, others)
    if not is_free:
        return found
    alone = [name for name in adapted if block_of(name, blocks) is None and can_be_refitted(reference, name, found)]
    return trace(reference, layers + adapted, few, blocks + alone, others) if alone else found


def _unseen(kept: Kept, settings: Distillation, context: Context) -> Callable[[], Iterator[Given]]:
    """The held-out images, not augmented. If none are held out: the augmented images that judge the blocks."""
    data, feed = context.required_data, context.feed(settings)
    if feed.held_out == 0:
        return kept.judging_images
    return lambda: (
        x for x, _ in data.held_out_batches(feed.held_out, at_once(data), context.device, feed.share, feed.reserved)
    )


def _train_block(
    model: nn.Module,
    reference: nn.Module,
    name: str,
    number: int,
    label: str,
    kept: Kept,
    settings: Distillation,
    context: Context,
    progress: Progress,
) -> None:
    block = model.get_submodule(name)
    model.eval().requires_grad_(False)
    block.requires_grad_(True)
    if settings.batch_norm == "updated" and not progress.is_under_way(number):
        _start_norms_(block, reference.get_submodule(name), kept, settings)
    for module in block.modules():
        # Only batch norms are set to training mode: the reference runs without dropout, so here it would be noise.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(settings.batch_norm == "updated")

    total = settings.total_steps(kept.per_epoch)
    with context.watch("distill", label, total, settings.batch_size, block=name) as on_step:
        fit(
            block,
            kept,
            _loss,
            settings,
            context.hardware,
            context.seed,
            part=number,
            progress=progress,
            watchers=Watchers(
                on_step, lambda network: -_judged(network, kept), lambda losses: _stalled(losses, settings.least_gain)
            ),
            kept=model,
        )
    model.eval()


def _start_norms_(block: nn.Module, original: nn.Module, kept: Kept, settings: Distillation) -> None:
    """Solves the block's batch norms in closed form for its present inputs, if its answer then comes closer."""
    norms, batches = count_norms(block), math.ceil(SHOWN / settings.batch_size)
    if norms == 0:
        return
    # Each batch norm takes a pass. A few batch norms get all images; if there are many, each gets a part.
    share = math.ceil(FEW_NORMS * batches / max(FEW_NORMS, norms))
    _if_closer_(block, kept, lambda: refit_norms_(block, original, lambda: kept.show((block, original), share)))
    rebase_(block, lambda: kept.show((block,), batches))


def _loss(block: nn.Module, given: Masked, target: Tensor) -> Tensor:
    return relative_error(filled(given.answer(block), given.masks), filled(target, given.masks))


@torch.no_grad()
def _solve(
    model: nn.Module, reference: nn.Module, name: str, label: str, kept: Kept, settings: Distillation, context: Context
) -> None:
    """Solves a dense layer in closed form; a block is trained by steps instead."""
    layer, original = model.get_submodule(name), reference.get_submodule(name)
    pairs = ((given.first, target, given.masks) for given, target in kept.training())
    loss = _if_closer_(layer, kept, lambda: refit_(layer, original, pairs, kept.per_epoch))
    with context.watch("distill", label, 1, settings.batch_size, block=name) as on_step:
        on_step(Step(0, 1, loss, 0.0))


def _if_closer_(block: nn.Module, kept: Kept, change: Callable[[], None]) -> float:
    """Keeps the change of a block only if it lowers the loss; returns the loss in the end."""
    before, state = _judged(block, kept), copy.deepcopy(block.state_dict())
    change()
    if (after := _judged(block, kept)) < before:
        return after
    block.load_state_dict(state)
    return before


@torch.no_grad()
def _judged(block: nn.Module, kept: Kept) -> float:
    """The mean loss of the batches that are not trained on, over all processes."""
    with evaluating(block):
        errors = torch.stack([_loss(block, call, target) for call, target in kept.judging()])
    return float(processes.summed(errors.mean())) / processes.count()


def _stalled(losses: list[float], least_gain: float) -> bool:
    """Whether the loss last fell by less than the share `least_gain`; never if this is 0."""
    return least_gain > 0 and len(losses) > 1 and losses[-1] > (1 - least_gain) * losses[-2]


def _run(work: Work) -> tuple[nn.Module, None]:
    distill(work.start, work.reference, work.settings, work.context, work.progress, work.planning.calibration)
    return work.start, None


def _find_blocks(settings: Distillation, reference: nn.Module, layers: Sequence[str]) -> None:
    find_blocks(reference, list(layers), settings.blocks)


PHASE = NetworkPhase(
    "distill", Distillation, run=_run, needs_data=True, check_network=_find_blocks, of_no_effect=("memory",)
)
