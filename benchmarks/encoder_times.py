"""ONNX files of the compressed sentence encoder: their bytes, and their time in ONNX Runtime beside the original's.

    python -m benchmarks.sentence_encoder --rates 0.8,0.5 --sizes "" --minutes 0
    python -m benchmarks.encoder_times [--threads 1]

The first command makes the networks; `benchmarks.sentence_encoder` explains them. The opponents are the original's
file, and the same with ONNX Runtime's dynamic int8, per channel. All files answer the same sentences, one after the
other and in batches of 32, by turns: the time is the median of the turns, and its ratio that of the medians. How near
the vectors are to the original's is in the table of the first command.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import tspc
from benchmarks.common import machine, table
from benchmarks.sentence_encoder import Encoder, trimmed
from benchmarks.sentences import sentences
from tspc.deploy.programs import onnx_session

SINGLE, BATCH, TURNS = 32, 32, 15
"""Sentences that are answered one by one, those of a batch, and how often."""


def files(folder: Path, kept: Path, example: torch.Tensor) -> dict[str, Path]:
    """The files by name: the original's, its int8, and those of the networks in `kept`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    dense = Encoder().eval()
    found = {"the original": folder / "dense.onnx", "dynamic int8 per channel": folder / "int8.onnx"}
    tspc.export(dense, found["the original"], example)
    quantize_dynamic(*found.values(), weight_type=QuantType.QInt8, per_channel=True)
    for path in sorted(kept.glob("rate-*.safetensors")):
        _, rate, method = path.stem.split("-")
        found[f"`{method}` at {rate}"] = folder / f"{path.stem}.onnx"
        tspc.export(tspc.load(path, model=Encoder()).eval(), found[f"`{method}` at {rate}"], example)
    return found


def answering(path: Path, threads: int, batches: list[np.ndarray]) -> Callable[[], None]:
    """What answers the batches with a file."""
    session = onnx_session(path, threads)
    name = session.get_inputs()[0].name

    def run() -> None:
        for batch in batches:
            session.run(None, {name: batch})

    return run


def in_turns(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:  # the first one warms the caches
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/sentence_encoder", help="where the first command left networks")
    options = arguments.parse_args()
    ids = sentences(Encoder().folder, options.seed).titles
    single = [trimmed(ids[i : i + 1]).numpy() for i in range(SINGLE)]
    with tempfile.TemporaryDirectory() as folder:
        found = files(Path(folder), Path(options.out), ids[:4])
        times = [
            in_turns({name: answering(path, options.threads, batches) for name, path in found.items()})
            for batches in (single, [trimmed(ids[:BATCH]).numpy()])
        ]
        sizes = {name: path.stat().st_size for name, path in found.items()}
    rows = []
    for name in found:
        cells = [
            f"{1e3 * took[name] / count:.2f} ({took[name] / took['the original']:.2f})"
            for took, count in zip(times, (SINGLE, 1), strict=True)
        ]
        rows.append([name, f"{sizes[name] / 1e6:.1f} ({sizes[name] / sizes['the original']:.3f})", *cells])
    print(f"\n{machine(options.seed)} ONNX Runtime has {options.threads} thread.\n")
    print(table(["file", "MB (share)", "ms for a sentence (share)", f"ms for {BATCH} sentences (share)"], rows))


if __name__ == "__main__":
    main()
