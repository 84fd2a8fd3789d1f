"""Calibration: a few hundred unlabelled images show the inputs of every layer.

Memory does not grow with the number of images. A layer's second moments are (S·H·W)² numbers, where S·H·W is the length
of an input patch. Large feature maps are represented by a seeded random choice of patches. Activations that wait for
their layer go to files beyond a limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tspc.calibration.kept_inputs import KeptInputs
from tspc.calibration.moments import Moments
from tspc.calibration.sensitivity import FEWEST, enough, output_sensitivity
from tspc.calibration.statistics import Statistics
from tspc.calibration.texts import check_tokens, is_text, tokens_of
from tspc.calibration.weights import RowWeights
from tspc.data.model_inputs import Given, first_of
from tspc.decompositions import Metric
from tspc.errors import ConfigError, DataError
from tspc.layers.dense import DenseLayer, has_inputs, kernel_of
from tspc.system.bounds import COUNT, NONE_OR_MORE, Bounds, out_of_range
from tspc.system.modes import own_modes
from tspc.system.tally import Tally
from tspc.traversal.hooks import evaluating
from tspc.traversal.layouts import takes_channels_last
from tspc.traversal.shortness import is_short_enough
from tspc.traversal.stash import Room, Stash
from tspc.traversal.tracing import Trace, trace
from tspc.traversal.walk import Walker

MATRICES = 1024
"""Megabytes of the layers' sensitivities in memory; more of them are kept in files."""


@dataclass(frozen=True)
class Calibration:
    """How the inputs of the layers are measured and used.

    - `samples`: the number of unlabelled training images; with 0 only the weights are used;
    - `batch_size`: images in a batch;
    - `patches`: about the largest number of patches from each layer's input;
    - `damping`: added to the diagonal of the second moments, as a share of its mean;
    - `sensitivity`: whether a layer's outputs are weighted by how much the network's answer depends on them;
    - `compensate`: whether every layer corrects the errors of the layers compressed before it; it is then fitted to
      the reference's outputs, with inputs from the compressed network;
    - `batch_norm`: `keep` the statistics of batch norms, `recalibrate` them, or `auto`: take the better of the two;
    - `memory`: MB of activations in memory; more of them wait in temporary files;
    - `precision`: `float32`, or `auto`: large networks run in bfloat16 where the CPU is faster so and the layers'
      outputs stay nearly the same.
    """

    samples: int = 512
    batch_size: int = 32
    patches: int = 16384
    damping: float = 1e-3
    sensitivity: bool = True
    compensate: bool = True
    batch_norm: str = "auto"
    memory: int = 256
    precision: str = "auto"

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        allowed = {
            "batch_norm": BATCH_NORMS,
            "precision": PRECISIONS,
            "samples": NONE_OR_MORE,
            "batch_size": COUNT,
            "patches": COUNT,
            "damping": Bounds(1e-15, 1e6),
            "memory": NONE_OR_MORE,
        }
        return out_of_range(self, where, allowed)


BATCH_NORMS = ("keep", "recalibrate", "auto")
PRECISIONS = ("auto", "float32")
TOKENS = 2**16
"""Of texts with at most so many tokens all gradients are taken, to see how much each position matters. About so many
tokens show the errors of layers."""
DIVERSE = 128
"""So many images are diverse enough for the errors of layers, however large the images are."""
FEW = 4
"""Images that show how much the network's activations change in bfloat16."""


def is_centred(layer: DenseLayer, name: str, trace: Trace) -> bool:
    """Whether a constant can be added to the layer's output: by its bias, or by its batch norm."""
    return layer.bias is not None or name in trace.batch_norms


@dataclass(frozen=True)
class Survey:
    """What the images show of an uncompressed network: its trace, and the weights of the layers' outputs."""

    trace: Trace
    sensitivity: Mapping[str, Stash]

    def statistics(self, name: str, layer: DenseLayer, moments: Moments, samples: Samples | Part) -> Statistics:
        return moments.statistics(kernel_of(layer), *self._measured(name, layer, samples))

    def metric(self, name: str, layer: DenseLayer, moments: Moments, samples: Samples | Part) -> Metric:
        return moments.metric(*self._measured(name, layer, samples))

    def _measured(
        self, name: str, layer: DenseLayer, samples: Samples | Part
    ) -> tuple[bool, float, Tensor | None, int]:
        # The rows of an image are alike; those of a text are different words.
        images = 0 if is_text(samples) else len(samples)
        return is_centred(layer, name, self.trace), samples.settings.damping, self.weights(name), images

    def weights(self, name: str) -> Tensor | None:
        """How much the layer's outputs matter (T × T, or the diagonal); None if that is unknown."""
        return self.sensitivity[name][0] if name in self.sensitivity else None


@dataclass(frozen=True)
class Part:
    """The first batches of some samples: as many images as show well enough how a network behaves.

    The last layers have few positions in an image, and tell its class. Of too few images a small rank keeps nearly all,
    so that the error at that rank seems to be small.
    """

    samples: Samples

    @property
    def settings(self) -> Calibration:
        return self.samples.settings

    def __len__(self) -> int:
        return sum(map(len, self))

    def __iter__(self) -> Iterator[Given]:
        fewest = DIVERSE
        tokens = tokens_of(next(iter(self.samples)))
        if tokens is not None:  # few have many positions, but too few words make wide layers seem simple
            fewest = max(FEWEST, TOKENS // max(1, tokens[0].numel()))
        yield from enough(self.samples, most=None, fewest=fewest)


class Samples:
    """Calibration inputs, kept for several walks through networks. Use as a context manager.

    `images` is a tensor (N, …), or an iterable of batches: tensors, tuples that begin with one, dicts of tensors,
    `ModelInputs`; or one of these. The first `settings.samples` inputs are used. A network gets what its `forward`
    takes of a batch, see `tspc.data.arranging`. Positions that an attention mask calls padded do not count. Raises
    DataError if there is no input. The `tally` counts batches that are read or used.
    """

    @own_modes()
    def __init__(
        self,
        images: Given | Iterable[Any],
        settings: Calibration | None = None,
        device: torch.device | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.settings, self.tally = settings or Calibration(), tally or Tally()
        problems = self.settings.problems("calibration")
        if problems:
            raise ConfigError(problems)
        self.room, self._matrices = Room(self.settings.memory), Room(MATRICES)
        self._sensitivity: tuple[nn.Module, dict[str, Stash]] | None = None
        self._asked = set[str]()
        self.weights = RowWeights()
        """How much the positions of texts matter to the network that was surveyed last; empty for other inputs."""
        self._is_closed = False
        self.short = False
        """Whether the network that was surveyed last runs in bfloat16."""
        self._surveyed: nn.Module | None = None
        try:
            counts = self.settings.samples, self.settings.batch_size
            self.kept = KeptInputs(images, *counts, self.room, self.tally)
            self.kept.device = device
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._is_closed = True
        self.room.close()
        self._matrices.close()

    def __len__(self) -> int:
        """The number of inputs."""
        return self.kept.count

    def __iter__(self) -> Iterator[Given]:
        """The inputs, batch by batch, on the device."""
        if self._is_closed:
            raise DataError("these samples are used up: their `with` block has ended; make new ones")
        yield from self.kept

    def example(self, model: nn.Module) -> Given:
        """One input in the form that the network takes. Raises DataError if it takes nothing of the inputs."""
        self.kept.suit(model)
        return next(iter(self))[:1]

    def survey(self, model: nn.Module, layers: Collection[str], later: Collection[str] = ()) -> Survey:
        """How a network calls the given layers, and how its answer depends on them.

        `later` names layers of a later survey. Their gradients are measured now, in the same passes.
        """
        self.kept.suit(model)
        few = next(iter(self))[:2]
        with evaluating(model), torch.random.fork_rng(devices=[]):  # it may draw random numbers
            try:
                self._settle(model)
                few, *others = self.kept.kinds()
                found = trace(model, layers, few, others=others)
            except (RuntimeError, ValueError, TypeError) as error:
                is_one = isinstance(few, Tensor)
                given = f"{tuple(few.shape[1:])}, {few.dtype} each" if is_one else repr(few)
                raise DataError(f"the network cannot take the calibration inputs ({given}): {error}") from error
            return Survey(found, self._sensitivity_of(model, [*layers, *later]))

    def _settle(self, model: nn.Module) -> None:
        """Chooses the layout of the images and the number format in which `model` runs; once for a network."""
        if self._surveyed is model:
            return
        check_tokens(model, self)
        images = next(iter(self))
        self.kept.layout = torch.channels_last if takes_channels_last(model, images[:2]) else None
        self.kept.see_orders(model)
        names = [name for name, module in model.named_modules() if has_inputs(module)]
        few = next(iter(self))[:FEW]
        wanted = self.settings.precision == "auto"
        self.short = wanted and is_short_enough(model, names, few, len(self))
        self._surveyed = model

    def _sensitivity_of(self, model: nn.Module, layers: Collection[str]) -> dict[str, Stash]:
        """The sensitivity of each layer; measured once for each layer of a network."""
        if self._sensitivity is None or self._sensitivity[0] is not model:
            for matrix in self._sensitivity[1].values() if self._sensitivity else ():
                matrix.clear()
            self._sensitivity, self._asked, self.weights = (model, {}), set(), RowWeights()
        found = self._sensitivity[1]
        missing = [name for name in dict.fromkeys(layers) if name not in self._asked]
        self._asked.update(missing)
        for name, matrix in self._gradients(model, missing):
            found[name] = Stash(self._matrices)
            found[name].append(matrix)
        return found

    def _gradients(self, model: nn.Module, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
        if self.settings.sensitivity:
            has_tokens_first = not next(iter(self)).is_floating_point()  # else the gradients of all inputs are slow
            is_weighted = has_tokens_first and sum(first_of(batch).numel() for batch in self) <= TOKENS
            weights = self.weights if is_weighted else None
            yield from output_sensitivity(model, layers, self, self.tally, self.short, weights, self.kept.orders)

    @property
    def patches_of_a_batch(self) -> int:
        return max(1, self.settings.patches // len(self.kept))

    def walk(self, model: nn.Module, trace: Trace, images: Part | None = None) -> Walker:
        return Walker(model, trace, images or self, self.room, short=self.short)


@contextmanager
def kept(
    images: Samples | Given | Iterable[Any] | None,
    settings: Calibration | None,
    model: nn.Module,
    tally: Tally | None = None,
) -> Iterator[Samples | None]:
    """Calibration data in any of its forms, kept on the device of `model` meanwhile; None if there is none.

    Raises ConfigError for wrong settings, and for others beside samples that have theirs.
    """
    if settings is not None and not isinstance(settings, Calibration):
        raise ConfigError([f"settings={type(settings).__name__}: expected tspc.Calibration, of the calibration data"])
    if isinstance(images, Samples):
        if settings not in (None, images.settings):
            raise ConfigError(["these Samples were kept with settings of their own; leave settings= out"])
        yield images
    elif images is None or (settings is not None and settings.samples == 0):
        yield None
    else:
        with Samples(images, settings, next((p.device for p in model.parameters()), None), tally) as samples:
            yield samples
