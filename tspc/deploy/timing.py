"""Latency of two networks side by side, in the installed runtimes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tspc.deploy.programs import Inputs, first_line, onnx_program, onnx_session, quiet, run_session, take, traced
from tspc.errors import ExportError
from tspc.system import extras
from tspc.traversal.copying import copied

RUNTIMES = ("eager", "compile", "onnx")
LEAST_REPEATS = 5

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One runtime at one batch size: seconds for a batch, of the dense and the compressed network, timed in turn.

    `speedup` is the median of dense ÷ compressed over the turns. If the runtime could not be used, `skipped` says why,
    and there are no numbers.
    """

    runtime: str
    batch_size: int
    repeats: int = 0
    dense: dict[str, float] | None = None
    compressed: dict[str, float] | None = None
    speedup: float | None = None
    skipped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    dense: nn.Module, compressed: nn.Module, inputs: Inputs, batch_size: int, runtime: str, seconds: float
) -> Timing:
    """`Comparison.at` for a single batch size."""
    return Comparison(dense, compressed, inputs, runtime, seconds).at(batch_size)


class Comparison:
    """Two networks in one runtime. Each batch size is timed in turn for about `seconds`, with at least five turns.

    `inputs` are on the device of the networks. Graphs for ONNX Runtime take any batch size, so each network is traced
    once.
    """

    def __init__(self, dense: nn.Module, compressed: nn.Module, inputs: Inputs, runtime: str, seconds: float) -> None:
        self.inputs, self.runtime, self.seconds = inputs, runtime, seconds
        self._networks = dense, compressed
        self._sessions: list[Any] | _Unusable | None = None

    @torch.no_grad()
    def at(self, batch_size: int) -> Timing:
        """The timing at a batch size, after a warm-up. If the runtime cannot run it, `Timing.skipped` says why."""
        batch = take(self.inputs, batch_size)
        device = batch[0].device
        try:
            runs = self._prepared(batch)
            for run in runs:
                for _ in range(2):
                    _timed(run, device)
            turns = list(_turns(runs[0], runs[1], device, self.seconds))
        except _Unusable as reason:
            return Timing(self.runtime, batch_size, skipped=str(reason))
        finally:
            if self.runtime == "compile":
                torch.compiler.reset()
        first, second = ([turn[i] for turn in turns] for i in (0, 1))
        ratio = statistics.median(a / b for a, b in turns)
        summaries = _summary(first, batch_size), _summary(second, batch_size)
        return Timing(self.runtime, batch_size, len(turns), *summaries, ratio)

    def _prepared(self, batch: Inputs) -> list[Run]:
        """Calls that run the batch. Raises _Unusable."""
        if self.runtime != "onnx":
            return [_prepared(network, batch, self.runtime) for network in self._networks]
        if self._sessions is None:
            try:
                self._sessions = [_session(network, self.inputs) for network in self._networks]
            except _Unusable as reason:
                self._sessions = reason
        if isinstance(self._sessions, _Unusable):
            raise self._sessions
        return [_in_session(session, batch) for session in self._sessions]


class _Unusable(Exception):
    """Why a runtime is left out."""


def _turns(dense: Run, compressed: Run, device: torch.device, seconds: float) -> Iterator[tuple[float, float]]:
    """Times both networks in each turn, so that other work of the machine affects both."""
    end, done = time.perf_counter() + seconds, 0
    while done < LEAST_REPEATS or time.perf_counter() < end:
        # The first one finds the caches as the other left them, so the order alternates.
        if done % 2:
            later = _timed(compressed, device)
            yield _timed(dense, device), later
        else:
            yield _timed(dense, device), _timed(compressed, device)
        done += 1


def _timed(run: Run, device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(times: list[float], batch_size: int) -> dict[str, float]:
    """Seconds, and inputs a second at the median."""
    ordered = sorted(times)
    median = statistics.median(ordered)
    p95 = ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]
    return {"median": median, "p95": p95, "throughput": batch_size / median}


def _prepared(model: nn.Module, batch: Inputs, runtime: str) -> Run:
    """A call that runs the batch in PyTorch. Raises _Unusable."""
    network = copied(model).eval()
    if runtime == "eager":
        return lambda: network(*batch)
    compiled = torch.compile(network, dynamic=False)

    def run() -> object:
        return compiled(*batch)

    try:
        with quiet("torch.utils.cpp_extension"):  # it says that there is no GPU
            run()
    except Exception as error:  # no compiler, or a network that it does not take
        lines = str(error).splitlines()
        raise _Unusable(f"torch.compile: {type(error).__name__}: {lines[0] if lines else ''}") from error
    return run


def _session(model: nn.Module, inputs: Inputs) -> Any:
    """The network in ONNX Runtime. Raises _Unusable."""
    lack = extras.missing("onnx")
    if lack is not None:
        raise _Unusable(lack)
    import onnxruntime

    device = inputs[0].device
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers() or device.type == "mps":
        raise _Unusable(f"this ONNX Runtime does not run on {device.type}")
    host = copied(model).cpu().eval()
    inputs = tuple(x.cpu() for x in inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        try:
            onnx_program(traced(host, inputs), inputs).save(str(path), external_data=False)
            return onnx_session(path, torch.get_num_threads(), (provider,))
        except ExportError as error:
            raise _Unusable(str(error)) from error


def _in_session(session: Any, batch: Inputs) -> Run:
    """A call that runs the batch. Raises _Unusable."""
    try:
        run_session(session, batch)
    except Exception as error:  # ONNX Runtime's own family, or a type of number that it does not take
        raise _Unusable(f"ONNX Runtime: {first_line(error)}") from error
    feed = {entry.name: x.cpu().numpy() for entry, x in zip(session.get_inputs(), batch, strict=True)}
    return lambda: session.run(None, feed)
