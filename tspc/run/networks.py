"""Runs the phases that make networks, in the run's locked directory. It skips the phases that are done."""

from __future__ import annotations

from typing import Any

from torch import nn

from tspc.compression import checkpoint
from tspc.errors import RunError, TrainingError
from tspc.phases.finished import read_record
from tspc.phases.phase import NetworkPhase
from tspc.phases.table import FIRST, NETWORK_PHASES
from tspc.run.dependencies import Dependencies, decisive_settings
from tspc.run.handover import Made, handed_over
from tspc.run.job import Job
from tspc.store.files import remove
from tspc.store.records import HANDED_OVER
from tspc.store.scores import described, shown
from tspc.system import interrupts, processes
from tspc.system.launch import is_first
from tspc.training import Progress, judged
from tspc.traversal.copying import copied


class Networks:
    """`finished` has the record of each phase whose network is in the directory, in the order of the phases."""

    def __init__(self, job: Job) -> None:
        self._job, self._context, self._directory = job, job.context, job.directory
        self._model: nn.Module | None = None
        """The last network, if it is in memory."""
        self.finished: dict[str, dict[str, Any]] = {}

    def make(self) -> None:
        """Runs the phases that were asked for and are not done yet."""
        requested = [phase for name, phase in NETWORK_PHASES.items() if name in self._job.config.phases]
        self._collect(before=requested[0] if requested else None)
        for phase in requested:
            needs = self._dependencies(phase)
            if not self._skip(phase, needs):
                self._do(phase, needs, is_last=phase is requested[-1])
        self._collect(before=None)

    @property
    def last(self) -> NetworkPhase:
        """The last phase that is finished."""
        return NETWORK_PHASES[next(reversed(self.finished))]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the last network; empty if there is none yet."""
        return self.finished[self.last.name]["fingerprint"] if self.finished else ""

    def read_last(self, network: nn.Module) -> nn.Module:
        """The last network, read from its file. `network` is a copy of the reference; it is changed in place."""
        return checkpoint.load(self._job.file(self.last), network)

    def _dependencies(self, phase: NetworkPhase) -> Dependencies:
        settings = decisive_settings(phase, self._job.config, self._context)
        return Dependencies(self._directory.identity, self._directory.asked, settings, self.fingerprint)

    def _collect(self, before: NetworkPhase | None) -> None:
        """Reads the records of the phases whose networks are in the directory, up to the phase `before`."""
        self.finished = {}
        for phase in NETWORK_PHASES.values():
            if phase is before:
                break
            if self._job.file(phase).exists():
                self.finished[phase.name] = read_record(self._job.file(phase))
                Progress.discard(self._job.progress_file(phase))  # left over if a process was killed

    def _skip(self, phase: NetworkPhase, needs: Dependencies) -> bool:
        """Whether the phase's network exists already. Raises RunError if it was made with other settings."""
        path = self._job.file(phase)
        if self._job.config.overwrite or not path.exists():
            return False
        record = read_record(path)
        if changes := needs.changes(phase, record):
            raise RunError(
                f"{path} was made with other settings ({'; '.join(changes)}); "
                "pass variant=NAME or another output_dir to keep both, or overwrite=true to redo it"
            )
        self._model = None
        Progress.discard(self._job.progress_file(phase))
        self.finished[phase.name] = self._measured(phase, record)
        self._tell(phase, f"done before: {shown(self.finished[phase.name]['accuracy'])}")
        return True

    def _measured(self, phase: NetworkPhase, record: dict[str, Any]) -> dict[str, Any]:
        """The record with the accuracy on this run's data; measured now if the network was made without this data."""
        data = self._context.data
        if data is None or record["data"] == data.fingerprint or phase.needs_data:
            return record
        path = self._job.file(phase)
        self._model = self._context.place(checkpoint.load(path, copied(self._job.reference)))
        record = record | {"data": data.fingerprint, "accuracy": self._accuracy(whole=False)}
        checkpoint.save(self._model, path, network=self._job.network, info=record)
        return record

    def _do(self, phase: NetworkPhase, needs: Dependencies, is_last: bool) -> None:
        self._refuse_to_outdate(phase)
        seconds = self._job.config.checkpoint_seconds
        progress = Progress(self._job.progress_file(phase), needs.fingerprint, seconds)
        self._directory.note({"phase": phase.name, "event": "start", "seconds_before": progress.seconds})
        if progress.warning:
            self._context.display.warn(f"{phase.name:<9}  {progress.warning}")
        self._model, plan = self._run(phase, progress)
        record = {
            "stage": phase.name,
            "settings": needs.settings,
            "after": needs.after,
            "fingerprint": needs.fingerprint,
            "seconds": progress.seconds,
            "data": None if self._context.data is None else self._context.data.fingerprint,
            "accuracy": self._accuracy(is_last or not _after(phase)),
            "plan": plan,
        }
        self._keep(phase, self._model, record)
        self._directory.note(
            {"phase": phase.name, "event": "end", "seconds": record["seconds"], "accuracy": record["accuracy"]}
        )
        self._tell(phase, described(record["accuracy"], self._job.config.metric))

    def _run(self, phase: NetworkPhase, progress: Progress) -> Made:
        """The phase's network, on the device, and its plan if the phase made one."""
        work = self._job.work(phase, self._current(), progress)
        try:
            if phase.hands_over:
                path = self._directory.file(phase.name + HANDED_OVER)
                model, plan = handed_over(lambda: phase.run(work), path, self._job.reference, self._job.network)
            else:
                model, plan = phase.run(work)
        except TrainingError as error:
            kept = self._job.file(self.last)
            raise TrainingError(f"{phase.name}: {error}; the network before it is kept in {kept}") from error
        return self._context.place(model), plan

    def _current(self) -> nn.Module | None:
        """The network that the next phase starts from; None if it starts from the reference."""
        if self._model is None and self.finished:
            self._model = self._context.place(self.read_last(copied(self._job.reference)))
        return self._model

    def _keep(self, phase: NetworkPhase, model: nn.Module, record: dict[str, Any]) -> None:
        # First the outdated networks are removed: after a kill no phase may stand beside an older one that it needs.
        for later in _after(phase):
            Progress.discard(self._job.progress_file(later))
            if is_first():
                remove(self._job.file(later))
        checkpoint.save(model, self._job.file(phase), network=self._job.network, info=record)
        Progress.discard(self._job.progress_file(phase))
        processes.wait()
        interrupts.check(f"after {phase.name}")
        self.finished[phase.name] = record

    def _tell(self, phase: NetworkPhase, text: str) -> None:
        self._context.display.finished(phase.name, text, self.finished[phase.name]["accuracy"])

    def _refuse_to_outdate(self, phase: NetworkPhase) -> None:
        """Raises RunError if there are networks of later phases, which started from another one and would be lost."""
        later = [path for path in map(self._job.file, _after(phase)) if path.exists()]
        if later and not self._job.config.overwrite:
            raise RunError(
                f"{later[0]} was made without {phase.name}, and would be outdated; "
                "pass variant=NAME or another output_dir to keep both, or overwrite=true to remove it"
            )

    def _accuracy(self, whole: bool) -> dict[str, Any] | None:
        config, data = self._job.config, self._context.data
        if data is None or (config.pretrained == "random" and list(config.phases) == [FIRST]):
            return None
        assert self._model is not None
        metric, limit = self._context.metric, None if whole else config.eval_samples
        return judged(metric, self._model, data, self._context.device, self._job.reference, limit=limit).to_dict()


def _after(phase: NetworkPhase) -> list[NetworkPhase]:
    phases = list(NETWORK_PHASES.values())
    return phases[phases.index(phase) + 1 :]
