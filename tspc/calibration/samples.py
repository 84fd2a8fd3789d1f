"""Calibration: a few hundred unlabelled images show the inputs of every layer.

Memory does not grow with the number of images. A layer's second moments are (S·H·W)² numbers, where S·H·W is the length
of an input patch. Large feature maps are represented by a seeded random choice of patches. Activations that wait for
their layer go to files beyond a limit.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tspc.calibration.batches import Batches, check_nothing_is_missing
from tspc.calibration.moments import Moments, Statistics
from tspc.calibration.patches import Positions, input_patches
from tspc.calibration.sensitivity import enough, output_sensitivity
from tspc.errors import ConfigError, DataError
from tspc.layers.dense import DenseLayer, kernel_of
from tspc.system.bounds import COUNT, NONE_OR_MORE, Bounds, out_of_range
from tspc.system.modes import own_modes
from tspc.system.parallel import in_parts
from tspc.system.tally import Tally
from tspc.traversal.hooks import evaluating
from tspc.traversal.layouts import takes_channels_last
from tspc.traversal.stash import Room, Stash
from tspc.traversal.tracing import Trace, trace
from tspc.traversal.walk import Walker

WIDEST = 8192
"""Longest input patch whose second moments are kept (half a gigabyte in float64)."""
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
    - `memory`: MB of activations in memory; more of them wait in temporary files.
    """

    samples: int = 512
    batch_size: int = 32
    patches: int = 16384
    damping: float = 1e-3
    sensitivity: bool = True
    compensate: bool = True
    batch_norm: str = "auto"
    memory: int = 256

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        allowed = {
            "batch_norm": BATCH_NORMS,
            "samples": NONE_OR_MORE,
            "batch_size": COUNT,
            "patches": COUNT,
            "damping": Bounds(1e-15, 1e6),
            "memory": NONE_OR_MORE,
        }
        return out_of_range(self, where, allowed)


BATCH_NORMS = ("keep", "recalibrate", "auto")


@dataclass(frozen=True)
class Survey:
    """What the images show of an uncompressed network: its trace, and the weights of the layers' outputs."""

    trace: Trace
    sensitivity: Mapping[str, Stash]

    def is_centred(self, name: str, layer: DenseLayer) -> bool:
        """Whether a constant can be added to the layer's output: by its bias, or by its batch norm."""
        return layer.bias is not None or name in self.trace.batch_norms

    def statistics(self, name: str, layer: DenseLayer, moments: Moments, samples: Samples | Part) -> Statistics:
        weights = self.sensitivity[name][0] if name in self.sensitivity else None
        return moments.statistics(
            kernel_of(layer), self.is_centred(name, layer), samples.settings.damping, weights, len(samples)
        )


@dataclass(frozen=True)
class Part:
    """The first batches of some samples: as many images as show well enough how a network behaves."""

    samples: Samples

    @property
    def settings(self) -> Calibration:
        return self.samples.settings

    def __len__(self) -> int:
        return sum(map(len, self))

    def __iter__(self) -> Iterator[Tensor]:
        yield from enough(self.samples, most=None)


class Samples:
    """Calibration images, kept for several walks through networks. Use as a context manager.

    `images` is a tensor (N, …), or an iterable of batches. A batch is a tensor, or a tuple that begins with a tensor.
    The first `settings.samples` images are used. The rest of a tuple is ignored; `survey` raises DataError if the
    network would use it. Raises DataError if there is no image. The `tally` counts batches that are read or used.
    """

    @own_modes()
    def __init__(
        self,
        images: Tensor | Iterable[Any],
        settings: Calibration | None = None,
        device: torch.device | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.settings, self.device, self.tally = settings or Calibration(), device, tally or Tally()
        problems = self.settings.problems("calibration")
        if problems:
            raise ConfigError(problems)
        self.room, self._matrices = Room(self.settings.memory), Room(MATRICES)
        self._sensitivity: tuple[nn.Module, dict[str, Stash]] | None = None
        self._asked = set[str]()
        self._is_closed = False
        self._layout: torch.memory_format | None = None
        self._images, self._count = Stash(self.room), 0
        try:
            batches = Batches(images, self.settings.samples, self.settings.batch_size)
            with self.tally.expecting(-(-self.settings.samples // self.settings.batch_size)):
                for batch in batches:
                    self._images.append(batch)
                    self._count += len(batch)
                    self.tally.add(f"{self._count} images read")
            self._first = batches.first
            if len(self._images) == 0:
                raise DataError("calibration needs at least one image, but the data gave none")
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
        """The number of images."""
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        """The images, batch by batch, on the device."""
        if self._is_closed:
            raise DataError("these samples are used up: their `with` block has ended; make new ones")
        for batch in self._images:
            own = batch if self.device is None else batch.to(self.device)
            yield own if self._layout is None else own.contiguous(memory_format=self._layout)

    def survey(self, model: nn.Module, layers: Collection[str], later: Collection[str] = ()) -> Survey:
        """How a network calls the given layers, and how its answer depends on them.

        `later` names layers of a later survey. Their gradients are measured now, in the same passes.
        """
        check_nothing_is_missing(model, self._first)
        images = next(iter(self))[:2]
        with evaluating(model), torch.random.fork_rng(devices=[]):  # it may draw random numbers
            try:
                self._layout = torch.channels_last if takes_channels_last(model, images) else None
                images = next(iter(self))[:2]
                found = trace(model, layers, images)
            except (RuntimeError, ValueError, TypeError) as error:
                given = f"{tuple(images.shape[1:])}, {images.dtype}"
                raise DataError(f"the network cannot take the calibration images ({given} each): {error}") from error
            return Survey(found, self._sensitivity_of(model, [*layers, *later]))

    def _sensitivity_of(self, model: nn.Module, layers: Collection[str]) -> dict[str, Stash]:
        """The sensitivity of each layer; measured once for each layer of a network."""
        if self._sensitivity is None or self._sensitivity[0] is not model:
            for matrix in self._sensitivity[1].values() if self._sensitivity else ():
                matrix.clear()
            self._sensitivity, self._asked = (model, {}), set()
        found = self._sensitivity[1]
        missing = [name for name in dict.fromkeys(layers) if name not in self._asked]
        self._asked.update(missing)
        for name, matrix in output_sensitivity(model, missing, self, self.tally) if self.settings.sensitivity else ():
            found[name] = Stash(self._matrices)
            found[name].append(matrix)
        return found

    @property
    def patches_of_a_batch(self) -> int:
        return max(1, self.settings.patches // len(self._images))

    def walk(self, model: nn.Module, trace: Trace, images: Part | None = None) -> Walker:
        return Walker(model, trace, images or self, self.room)


@contextmanager
def kept(
    images: Samples | Tensor | Iterable[Any] | None,
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


def is_narrow(layer: nn.Module) -> bool:
    """Whether the second moments of the layer's inputs can be kept."""
    return _entries(layer) <= WIDEST**2


def _entries(layer: nn.Module) -> int:
    """The number of entries in the second moments of the layer's inputs, over all groups of its channels."""
    return getattr(layer, "groups", 1) * kernel_of(layer)[0].numel() ** 2


def megabytes(model: nn.Module, name: str) -> float:
    """The memory of the second moments of the layer's inputs."""
    return 8 * _entries(model.get_submodule(name)) / 2**20


def moments_of(
    model: nn.Module, layers: Collection[str], samples: Samples, trace: Trace, images: Part | None = None
) -> Iterator[tuple[str, Moments]]:
    """The moments of each layer's inputs in an uncompressed network, over all samples or a part of them.

    Layers that are never called, or whose inputs are too wide, are left out.
    """
    walker = samples.walk(model, trace, images)
    try:
        for segment in trace.segments:
            walker.advance()
            inside = [name for name in segment.layers if name in layers and is_narrow(model.get_submodule(name))]
            # As many as fit into memory together.
            parts = list(in_parts(inside, lambda name: megabytes(model, name), samples.settings.memory))
            for part in parts:
                found = gather(walker, part, samples, for_the_last_time=part is parts[-1])
                for name in part:
                    if name in found:
                        yield name, found.pop(name)  # given away, so that its memory can be freed
    finally:
        walker.close()


def gather(
    walker: Walker, layers: Collection[str], samples: Samples, for_the_last_time: bool = False
) -> dict[str, Moments]:
    """The moments of the layers' inputs in the present segment, without layers that are not called."""
    moments: dict[str, Moments] = {}

    def see(name: str, batch: int, inputs: Tensor, outputs: Tensor) -> None:
        layer = cast(DenseLayer, walker.model.get_submodule(name))
        x = input_patches(layer, inputs, positions_of(layer, name, batch, outputs, samples))
        moments.setdefault(name, Moments(x.shape[-1], None, x.device, len(x))).add(x)

    for _ in walker.inputs_of(layers, see, for_the_last_time):
        pass
    return moments


def positions_of(layer: DenseLayer, name: str, batch: int, outputs: Tensor, samples: Samples) -> Positions:
    """Which of a layer's outputs count; the same ones in the reference and in the compressed network."""
    return Positions.at_most(samples.patches_of_a_batch, layer, outputs, zlib.crc32(name.encode()) + batch)
