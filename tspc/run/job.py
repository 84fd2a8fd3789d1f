"""What the phases of one run work with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tspc.models import NetworkSpec
from tspc.phases.context import Context
from tspc.phases.judging import Judging
from tspc.phases.phase import NetworkPhase, Phase, Work
from tspc.phases.planning import Planning
from tspc.run.config import Config
from tspc.store.directory import RunDirectory
from tspc.training import Progress


@dataclass(frozen=True)
class Job:
    """`reference` is the pretrained network, on the device and in eval mode. `bytes_before` is the size of its state.

    `directory` is the run's directory; it is open and locked. `judging` judges a limit on the drop, if there is one.
    """

    config: Config
    network: NetworkSpec
    reference: nn.Module
    planning: Planning
    context: Context
    directory: RunDirectory
    bytes_before: int
    judging: Judging | None = None

    def file(self, phase: NetworkPhase) -> Path:
        """The file for the network of a phase."""
        return self.directory.file(f"{phase.name}.safetensors")

    def progress_file(self, phase: NetworkPhase) -> Path:
        """The file for the state of a phase that is not finished."""
        return self.directory.file(f"{phase.name}.progress.pt")

    def work(self, phase: Phase, model: nn.Module | None = None, progress: Progress | None = None) -> Work:
        """What the phase gets when it runs. It starts from `model`."""
        settings: Any = self.config.phases[phase.name]
        folder, progress = self.directory.path, progress or Progress()
        own = self.network, self.reference, self.planning, self.context
        return Work(settings, *own, folder, model, progress, self.judging)
