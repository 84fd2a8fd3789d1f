"""The stages of one run inside its locked directory: skip what is done, do the rest, write the result."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from torch import nn

from tspc.compression import checkpoint
from tspc.compression.planning import plan
from tspc.errors import RunError, TrainingError
from tspc.models import NetworkSpec
from tspc.pages import made, write_report
from tspc.phases.context import Context
from tspc.phases.decompose import calibration_samples, decompose, example_input
from tspc.phases.distill import distill
from tspc.phases.finetune import finetune
from tspc.phases.finished import read_stage
from tspc.run.config import Config
from tspc.run.delivery import Delivery, made_with
from tspc.run.reference import Reference, reference_curves
from tspc.run.result import result_of
from tspc.store.directory import RunDirectory
from tspc.store.files import remove, write_json
from tspc.store.records import SHARED, STAGES, differences, fingerprint, plain, unfinished
from tspc.system import interrupts, processes
from tspc.system.launch import is_first
from tspc.terminal.tables import percent, plan_table, result_lines, result_table, state_bytes
from tspc.training import Progress, evaluate
from tspc.traversal.copying import copied


class Stages:
    """One run: the reference network, and what became of it so far."""

    def __init__(
        self,
        config: Config,
        spec: NetworkSpec,
        reference: Reference,
        context: Context,
        directory: RunDirectory,
        shared: Path,
    ) -> None:
        self.config, self.spec, self.context, self.directory = config, spec, context, directory
        self._source, self._shared = reference, shared
        self.reference = context.place(reference.model).eval()
        self.bytes_before = state_bytes(self.reference)
        self.model: nn.Module | None = None
        self.finished: dict[str, dict[str, Any]] = {}

    def execute(self, reference: dict[str, Any]) -> dict[str, Any]:
        """Runs the stages asked for; `reference` is what the result says of the reference network."""
        requested = [stage for stage in STAGES if stage in self.config.phases]
        self._collect(before=requested[0] if requested else None)
        for stage in requested:
            settings = self._settings(stage)
            if not self._skip(stage, settings):
                self._do(stage, settings, is_last=stage == requested[-1])
        self._collect(before=None)
        return processes.by_first(lambda: self._finish(reference))

    def _settings(self, stage: str) -> dict[str, Any]:
        """What the stage depends on, beside the run's identity and the stage before."""
        settings = plain(getattr(self.config, stage))
        if settings.get("steps") is not None:
            settings["epochs"] = None  # has no effect
        settings.pop("memory", None)  # nor on the result
        if stage != "decompose" and self.context.hardware.precision is not None:
            settings["precision"] = str(self.context.hardware.precision).removeprefix("torch.")
        if stage != "decompose" or self._calibrates:
            settings["data"] = self.context.required_data.fingerprint
        return settings

    @property
    def _calibrates(self) -> bool:
        return self.context.data is not None and self.config.calibration.samples > 0

    def _mark(self, settings: dict[str, Any], after: str) -> str:
        return fingerprint([self.directory.identity, settings, after])

    def _progress_file(self, stage: str) -> Path:
        return self.directory.file(f"{stage}.progress.pt")

    def _file(self, stage: str) -> Path:
        return self.directory.file(f"{stage}.safetensors")

    def _collect(self, before: str | None) -> None:
        """Learns which earlier stages the directory holds; stages after `before` do not matter yet."""
        self.finished = {}
        for stage in STAGES:
            if stage == before:
                break
            if self._file(stage).exists():
                self.finished[stage] = read_stage(self._file(stage))
                Progress.discard(self._progress_file(stage))  # of a process that was killed before it did

    def _after(self) -> str:
        """Fingerprint of the stage that the next one starts from."""
        return next(reversed(self.finished.values()))["fingerprint"] if self.finished else ""

    def _skip(self, stage: str, settings: dict[str, Any]) -> bool:
        """Whether the stage is already there. Raises RunError if it is there with other settings."""
        path = self._file(stage)
        if self.config.overwrite or not path.exists():
            return False
        info = read_stage(path)
        changed = differences(info["settings"], settings, f"phase.{stage}")
        if info["after"] != self._after():
            changed.append(f"what {stage} started from")
        elif not changed and info["fingerprint"] != self._mark(settings, self._after()):
            changed.append("the run that it belongs to")
        if changed:
            raise RunError(
                f"{path} was made with other settings ({'; '.join(changed)}); "
                "pass variant=NAME or another output_dir to keep both, or overwrite=true to redo it"
            )
        self.model = None
        Progress.discard(self._progress_file(stage))
        self.finished[stage] = self._measured(stage, info)
        self._tell(stage, "done before: ")
        return True

    def _measured(self, stage: str, info: dict[str, Any]) -> dict[str, Any]:
        """With the accuracy on the data at hand: a network decomposed without data, or with other, has none yet."""
        data = self.context.data
        if data is None or info["data"] == data.fingerprint or stage != "decompose":
            return info
        self.model = self.context.place(checkpoint.load(self._file(stage), copied(self.reference)))
        info = info | {"data": data.fingerprint, "accuracy": self._accuracy(whole=False)}
        checkpoint.save(self.model, self._file(stage), network=self.spec, info=info)
        return info

    def _do(self, stage: str, settings: dict[str, Any], is_last: bool) -> None:
        self._refuse_to_outdate(stage)
        after = self._after()
        mark = self._mark(settings, after)
        progress = Progress(self._progress_file(stage), mark, self.config.checkpoint_seconds)
        self.directory.note({"phase": stage, "event": "start", "seconds_before": progress.seconds})
        started = time.monotonic()
        plan_data = None
        if progress.warning:
            self.context.display.warn(f"{stage:<9}  {progress.warning}")
        if stage == "decompose":
            self.model, plan_data = self._decomposed_by_first()
            seconds = time.monotonic() - started
        else:
            self._train(stage, progress)
            seconds = progress.seconds
        info = {
            "stage": stage,
            "settings": settings,
            "after": after,
            "fingerprint": mark,
            "seconds": seconds,
            "data": None if self.context.data is None else self.context.data.fingerprint,
            "accuracy": self._accuracy(is_last or stage == STAGES[-1]),
            "plan": plan_data,
        }
        assert self.model is not None
        # First the outdated ones go: a kill in between must not leave a chain of stages that does not hold together.
        for later in STAGES[STAGES.index(stage) + 1 :]:
            Progress.discard(self._progress_file(later))
            if is_first():
                remove(self._file(later))
        checkpoint.save(self.model, self._file(stage), network=self.spec, info=info)
        Progress.discard(self._progress_file(stage))
        processes.wait()
        interrupts.check(f"after {stage}")
        self.finished[stage] = info
        self.directory.note({"phase": stage, "event": "end", "seconds": seconds, "accuracy": info["accuracy"]})
        self._tell(stage, "top-1 ")

    def _tell(self, stage: str, how: str) -> None:
        accuracy = self.finished[stage]["accuracy"]
        self.context.display.finished(
            stage, f"{how}{percent(accuracy)}", None if accuracy is None else accuracy["top1"]
        )

    def _refuse_to_outdate(self, stage: str) -> None:
        """Later stages that started from something else would be lost. Raises RunError if there are any."""
        later = [self._file(s) for s in STAGES[STAGES.index(stage) + 1 :] if self._file(s).exists()]
        if later and not self.config.overwrite:
            raise RunError(
                f"{later[0]} did not start from {stage}, and would be outdated by it; "
                "pass variant=NAME or another output_dir to keep both, or overwrite=true to give it up"
            )

    def _decomposed_by_first(self) -> tuple[nn.Module, dict[str, Any]]:
        """What the first process decomposed, in all of them: the others read it from a file."""
        if processes.count() == 1:
            model, plan_data = self._decompose()
            return self.context.place(model), plan_data
        path = self.directory.file(SHARED)

        def decompose() -> dict[str, Any]:
            model, plan_data = self._decompose()
            checkpoint.save(model, path, network=self.spec)
            return plan_data

        plan_data = processes.by_first(decompose)
        model = checkpoint.load(path, copied(self.reference))
        processes.wait()
        if is_first():
            remove(path)
        return self.context.place(model), plan_data

    def _decompose(self) -> tuple[nn.Module, dict[str, Any]]:
        """The decomposed network, and its plan as plain data."""
        planning = self.config.planning
        with calibration_samples(self.config.calibration, self.context) as samples:
            curves = None
            if planning.needs_curves:
                curves = reference_curves(self._source, self.config, samples, self.context, self._shared)
            example = example_input(self.reference, self.spec)
            ranks = plan(self.reference, planning, curves=curves, example=example)
            model, done, spectra = decompose(self.reference, ranks, samples, self.context)
        write_json(self.directory.file("spectra.json"), [dataclasses.asdict(spectrum) for spectrum in spectra])
        sizes = self.bytes_before, state_bytes(model)
        width = self.context.display.console.width
        self.context.display.show(plan_table(done, *sizes, width=width), logged=plan_table(done, *sizes, max_rows=None))
        return model, done.to_dict()

    def _train(self, stage: str, progress: Progress) -> None:
        model = self._current(stage)
        try:
            if stage == "distill":
                assert self.config.distill is not None
                distill(model, self.reference, self.config.distill, self.context, progress)
            else:
                assert self.config.finetune is not None
                finetune(model, self.reference, self.config.finetune, self.context, progress, stage)
        except TrainingError as error:
            kept = self._file(next(reversed(self.finished)))
            raise TrainingError(f"{stage}: {error}; the network before it is kept in {kept}") from error

    def _current(self, stage: str) -> nn.Module:
        """The network that the stage starts from."""
        if self.model is None:
            path = self._file(next(reversed(self.finished)))
            self.model = self.context.place(checkpoint.load(path, copied(self.reference)))
        return self.model

    def _accuracy(self, whole: bool) -> dict[str, Any] | None:
        if self.context.data is None or (self.config.pretrained == "random" and self.config.phases == ("decompose",)):
            return None
        assert self.model is not None
        return evaluate(
            self.model, self.context.data, self.context.device, limit=None if whole else self.config.eval_samples
        ).to_dict()

    def _finish(self, reference: dict[str, Any]) -> dict[str, Any]:
        """Writes `model.safetensors` and `result.json` from the furthest stage."""
        last, target = next(reversed(self.finished)), self.directory.file("model.safetensors")
        model = checkpoint.load(self._file(last), copied(self.reference).cpu())
        checkpoint.save(model, target, network=self.spec, info={"stage": last, "identity": self.directory.identity})
        sizes = {"before": self.bytes_before, "after": state_bytes(model), "file": target.stat().st_size}
        result = result_of(self.config, self.spec, self.directory.path, self.finished, reference, sizes)
        result["device"] = str(self.context.device)
        result |= made_with(self.directory.file("result.json"), result["phases"])
        delivery = Delivery(self.config, self.spec, self.context, self.directory, self._after())
        write_json(self.directory.file("result.json"), result | delivery.found())
        self.context.display.show(result_table(result))
        for line in result_lines(result, target):
            self.context.display.line(line)
        if stopped := unfinished(self.directory.path):
            self.context.display.warn(f"{stopped} was stopped before its end; this is the network after {last}")
        delivery.deliver(self.reference, model)
        delivery.show()
        write_json(self.directory.file("result.json"), result := result | delivery.found())
        if self.config.report:
            made(lambda: write_report(self.directory.path), self.context.display)
        return result
