"""Which held-out training images judge a limit on the drop, and what an earlier run's training gave back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tspc.compression.compress import limit_of
from tspc.compression.limits import MOST, PILOT, Limit, pilot_of
from tspc.compression.outline import Outline
from tspc.compression.settings import PlanSettings
from tspc.data import Batch, Data, at_once
from tspc.errors import ConfigError
from tspc.phases.context import Context
from tspc.training import Drop, HeldOut, Metric

TRAINED_SHARE = 5
"""If the network is trained, at most the training images divided by this are reserved."""
LEAST_SHARE, MOST_SHARE = 0.02, 1.0
"""Bounds of the share of a drop that is left after a training."""

Pair = tuple[float, float]
"""The drops of one network before and after its training, in points."""


def judges_of(settings: PlanSettings, metric: Metric, data: Data | None, calibration: int, is_trained: bool) -> int:
    """How many images judge the drop: fresh ones if there are any, else training images; 0 without a limit on it.

    Raises ConfigError or DataError if there is no data, or there are too few images.
    """
    if settings.max_drop is None:
        return 0
    goal = f"max_drop={settings.max_drop:g}"
    if data is None:
        raise ConfigError([f"{goal} is judged on held-out training images: name a data set"])
    asked, most = settings.terms.images, max(0, data.train_size - calibration)
    of = f"{data.train_size:,} training images"
    if is_trained:
        most = min(most, data.train_size // TRAINED_SHARE)
    if data.fresh_size:
        most, of = data.fresh_size, f"{data.fresh_size:,} images in held_out/"
    pilot = pilot_of(most)
    if asked is not None and most < asked + pilot:
        few = f"at most {most - pilot:,} of the {of} can judge, beside a pilot"
        raise ConfigError([f"contract.images={asked}: {few}"])
    judges = min(most, PILOT + (asked or MOST))
    limit = Limit(settings.max_drop, 1 - settings.terms.confidence, asked)
    limit.check(judges, metric.has_counts)
    return judges


@dataclass(frozen=True)
class Judging:
    """How the drop is judged: by `held_out` images. `known` has the drops of earlier runs with the same training."""

    settings: PlanSettings
    held_out: HeldOut
    is_trained: bool
    known: Sequence[Pair] = ()

    def limit(self, sketch: Outline) -> Limit:
        """What a search keeps."""
        return limit_of(self.settings, sketch, is_trained=self.is_trained, given_back=self.given_back)

    @property
    def knows(self) -> bool:
        """Whether an earlier run tells what the training gives back."""
        return any(before > 0 for before, _ in self.known)

    def given_back(self, drop: float) -> float:
        """The drop that is expected after the training: the share that it left of the nearest drop that is known."""
        pairs = [pair for pair in self.known if pair[0] > 0]
        if not pairs or drop <= 0:
            return drop
        before, after = min(pairs, key=lambda pair: abs(math.log(pair[0] / drop)))
        return drop * min(max(after / before, LEAST_SHARE), MOST_SHARE)

    def after(self, network: nn.Module) -> Drop:
        """The drop of the network after its training on the pilot, by which later runs may choose."""
        return self.held_out.drop(network, 0, pilot_of(self.held_out.count))

    def final(self, network: nn.Module, sketch: Outline) -> Drop:
        """The drop of the network after its training, on images by which nothing was chosen."""
        pilot, inputs = self.limit(sketch).parts(self.held_out.count)
        return self.held_out.drop(network, pilot, pilot + inputs)


def held_out_images(reference: nn.Module, context: Context, count: int) -> HeldOut:
    """The images that judge, in the order in which the search uses them: fresh ones, or reserved training images."""
    data = context.required_data

    def read(start: int, stop: int) -> Iterable[Batch]:
        if data.fresh_size:
            return data.fresh_batches(start, stop, at_once(data), context.device)
        return data.held_out_batches(stop - start, at_once(data), context.device, reserved=count - stop)

    return HeldOut(reference, context.metric, read, count, context.device)
