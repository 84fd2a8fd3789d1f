"""A table of measured times of single layers in one runtime, kept on disk for this machine.

A layer is measured at a few ranks. In between the cost model (`estimate`) says how the time goes with the rank, for it
knows the steps at which channels are padded; the table corrects it by the ratio of measured and estimated times. Layers
of equal shapes are measured once, whatever their method is called.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tspc.compression.form import rank_for
from tspc.compression.path_costs import Size, estimate, map_of
from tspc.compression.runtime_costs import WORK
from tspc.decompositions import Decomposition, Rank, Shape
from tspc.deploy.calls import EXTRAS, family, precision
from tspc.deploy.exporting import INT8
from tspc.deploy.layer_graphs import operations, seconds_of
from tspc.errors import ExportError, RunError, UntimedError
from tspc.layers.chains import REBUILT, Stage, paths_of, stages_of
from tspc.layers.convolutions import Form
from tspc.store.files import intact, make_folder, write_json
from tspc.store.schemas import LAYER_TIMES

SHARES = (0.02, 0.06, 0.15, 0.35, 0.7)
"""The sizes at which a layer is measured, as shares of its kernel."""
REPEATS, WARM = 12, 2
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The package whose version decides how fast a family of runtimes is; else it is PyTorch."""
LEAST = 1e-7
"""Seconds; the clocks of the runtimes count whole microseconds."""

Clock = Callable[[Form, Sequence[Stage], Size], float]
"""Seconds of the convolutions of a path, for a batch of inputs of this size."""


@dataclass(frozen=True)
class Place:
    """Where a network runs: a runtime, the inputs in a batch, the threads. In PyTorch also the kind of device."""

    runtime: str
    batch: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_elsewhere(self) -> bool:
        """Whether the runtime is not PyTorch; such runtimes are timed on the CPU."""
        return family(self.runtime) in EXTRAS

    @property
    def table(self) -> str:
        """The runtime in which single layers are measured: "compile" counts as "eager", 8 bits as float32."""
        name = family(self.runtime) if precision(self.runtime) == INT8 else self.runtime
        return "eager" if name == "compile" else name

    def identity(self) -> dict[str, str | int]:
        """All that the times of a layer depend on besides the layer."""
        is_gpu = not self.is_elsewhere and self.device.type == "cuda"
        package = PACKAGES.get(family(self.table), "torch")
        try:
            number = version(package)
        except PackageNotFoundError:  # the caller tells which package is absent
            number = ""
        return {
            "machine": torch.cuda.get_device_name(self.device) if is_gpu else processor(),
            "runtime": self.table,
            "version": f"{package} {number}",
            "threads": self.threads,
            "batch": self.batch,
        }


@lru_cache(maxsize=1)
def processor() -> str:
    """The name of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where tables are kept: `tspc` in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tspc"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside this context PyTorch, and what `tspc.deploy` opens, have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock_of(place: Place) -> Clock:
    """Measures in the runtime. Raises UntimedError if the runtime does not take a layer."""

    def elsewhere(form: Form, stages: Sequence[Stage], size: Size) -> float:
        try:
            return seconds_of(operations(form, stages), place.batch, map_of(form, size), place.table, place.threads)
        except ExportError as error:
            raise UntimedError([f"runtime={place.runtime} cannot time a layer: {error}"]) from error

    @torch.no_grad()
    def eager(form: Form, stages: Sequence[Stage], size: Size) -> float:
        like = {"device": place.device, "dtype": torch.float32}
        parts = [form.module(stage, i == len(stages) - 1, **like) for i, stage in enumerate(stages)]
        module, channels = nn.Sequential(*parts).eval(), stages[0].channels
        where = map_of(form, size)
        x = torch.ones(place.batch, *((channels, *where) if form.is_convolution else (*where, channels)), **like)
        times = []
        with threads(place.threads):
            for _ in range(REPEATS + WARM):
                started = time.perf_counter()
                module(x)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                times.append(time.perf_counter() - started)
        return sorted(times[WARM:])[REPEATS // 4]

    return elsewhere if place.is_elsewhere else eager


class LayerTimes:
    """Seconds of layers for a batch of inputs; measured when they are first needed.

    `clock` measures; by default in the runtime. `folder` keeps the times, by default among the user's caches. With
    another clock and no folder nothing is kept. A file that is damaged or of another machine is made again.
    """

    def __init__(self, place: Place, clock: Clock | None = None, folder: Path | None = None) -> None:
        self.place, self._clock = place, clock or clock_of(place)
        self._folder = folder or (None if clock else cache_folder())
        self._measured: dict[str, float] = self._read()
        self._kept = len(self._measured)
        self._known: dict[object, float] = {}
        self._ratios: dict[object, tuple[list[float], list[float]]] = {}

    @property
    def path(self) -> Path | None:
        """The file of this runtime on this machine."""
        text = "|".join(map(str, self.place.identity().values()))
        name = f"times-{self.place.table}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        return self._folder and self._folder / name

    def _read(self) -> dict[str, float]:
        found = intact(self.path, LAYER_TIMES) if self.path else None
        if found is None or any(found[key] != value for key, value in self.place.identity().items()):
            return {}
        return dict(found["seconds"])

    def keep(self) -> None:
        """Writes what was measured since the table was read. A folder that cannot be written costs time only."""
        if self.path is None or len(self._measured) == self._kept:
            return
        with suppress(RunError):
            make_folder(self.path.parent)
            write_json(self.path, {**self.place.identity(), "seconds": self._read() | self._measured})
        self._kept = len(self._measured)

    def seconds(
        self, form: Form, shape: Shape, size: Size, method: Decomposition, rank: Rank, path: str = REBUILT
    ) -> float:
        """The time of a layer whose kernel has this shape, for a batch of inputs of this size."""
        key = (form, shape, size) if path == REBUILT else (form, shape, size, method, rank, path)
        if key not in self._known:
            stages = stages_of(method, shape, rank, path, form.groups)
            known, ratios = ([], []) if path == REBUILT else self._anchors(form, shape, size, method)
            if known:
                estimated = self._estimate(form, stages, size)
                ratio = float(np.interp(math.log(estimated), known, ratios))
                self._known[key] = ratio * estimated
            else:
                self._known[key] = self._at(form, stages, size)
        return self._known[key]

    def _estimate(self, form: Form, stages: list[Stage], size: Size) -> float:
        """In multiply-adds of the whole batch."""
        return self.place.batch * estimate(form, stages, size, WORK[self.place.runtime], self.place.batch)

    def _anchors(self, form: Form, shape: Shape, size: Size, method: Decomposition) -> tuple[list[float], list[float]]:
        """The logarithms of estimated times, ascending, and measured ÷ estimated times at some ranks."""
        key = form, shape, size, method
        if key not in self._ratios:
            entries, found = math.prod(shape), {}
            for share in SHARES:
                rank = rank_for(method, shape, max(int(share * entries), method.min_params(shape)))
                paths = [path for path in paths_of(method, shape, rank, form.groups) if path != REBUILT]
                tried = [stages_of(method, shape, rank, path, form.groups) for path in paths]
                if tried:
                    estimated, best = min(
                        ((self._estimate(form, stages, size), i) for i, stages in enumerate(tried)), key=lambda x: x[0]
                    )
                    found[math.log(estimated)] = self._at(form, tried[best], size) / estimated
            self._ratios[key] = sorted(found), [found[each] for each in sorted(found)]
        return self._ratios[key]

    def _at(self, form: Form, stages: Sequence[Stage], size: Size) -> float:
        """The measured time; in 8 bits that of float32, changed as the cost models of both say."""
        key = f"{form.kind} {'x'.join(map(str, size))} " + " ".join(map(str, operations(form, stages)))
        if key not in self._measured:
            self._measured[key] = max(self._clock(form, stages, size), LEAST)
        found = self._measured[key]
        if precision(self.place.runtime) == INT8:
            work = WORK[self.place.runtime], WORK[self.place.table]
            own, plain = (estimate(form, list(stages), size, each, self.place.batch) for each in work)
            found *= own / plain
        return found
