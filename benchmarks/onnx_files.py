"""ONNX files of a ResNet-32 in few bits: their bytes, how long they take to load and to run, and their accuracy.

    pip install -e '.[onnx]'
    python -m benchmarks.onnx_files --data CIFAR --weights resnet32.pt [--sizes 0.25,0.1,0.06 --method auto]

Fitted with 512 images, no training. Every network is written twice: as `tspc.export` does it, with integers, and with
float32 numbers in their place. Both files are timed in turns, batches of 1, one thread; the ratio is of medians. Beside
them are the dense network in float32, and its int8 file, for which 256 training images show the activations' ranges.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import tspc
from benchmarks.common import calibration_images, cifar_reference, machine, parser, table
from benchmarks.int8 import BATCH, CPU, in_onnx
from tspc.compression.integers import state_bytes
from tspc.data import Data
from tspc.deploy.exporting import Exporter
from tspc.deploy.onnx_programs import onnx_program
from tspc.deploy.programs import onnx_session, run_session
from tspc.deploy.timing import turns
from tspc.training import accuracy

SECONDS, LOADS = 5.0, 11


def loading(path: Path) -> float:
    """Milliseconds to open the file."""
    found = []
    for _ in range(LOADS):
        started = time.perf_counter()
        onnx_session(path, threads=1)
        found.append(1000 * (time.perf_counter() - started))
    return statistics.median(found)


def top1(path: Path, format: str, data: Data) -> float:
    network = in_onnx(path, format).eval()
    return 100 * accuracy(network, data.test_batches(BATCH, CPU), data.num_classes, CPU).top1


def row(name: str, model: nn.Module, data: Data, images: Tensor, folder: Path) -> list[str]:
    """The files of one network, with integers and with float32 numbers."""
    exporter, stored, plain = Exporter(model, images[:8], 1e-4), folder / "stored.onnx", folder / "plain.onnx"
    exporter.write(stored, "onnx")
    onnx_program(exporter.program, exporter.inputs, exporter.signature).save(str(plain), external_data=False)
    sessions = [onnx_session(path, threads=1) for path in (plain, stored)]
    runs = [lambda session=session: run_session(session, (images[:1].contiguous(),)) for session in sessions]
    times = list(zip(*turns(runs, CPU, SECONDS), strict=True))
    before, after = (statistics.median(found) for found in times)
    cells = [f"{state_bytes(model):,}", f"{stored.stat().st_size:,}", f"{plain.stat().st_size:,}"]
    return [
        name,
        *cells,
        f"{loading(stored):.0f}",
        f"{loading(plain):.0f}",
        f"{after / before:.3f}",
        f"{top1(stored, 'onnx', data):.2f}",
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", default="0.25,0.1,0.06")
    arguments.add_argument("--method", default="auto")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    _, data, model = cifar_reference(options)
    model.eval()
    images = calibration_images(data, 512, 512, CPU)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [row("dense, float32", model, data, images, folder)]
        int8 = folder / "model.int8.onnx"
        tspc.export(model, int8, images[:8], calibration=list(images[:256].split(32)))
        cells = [f"{int8.stat().st_size:,}", "", f"{loading(int8):.0f}", "", "", f"{top1(int8, 'int8', data):.2f}"]
        rows.append(["dense, int8 with activations", "", *cells])
        for size in options.sizes.split(","):
            small = tspc.compress(model, options.method, size=size, calibration=images).eval()
            rows.append(row(f"`{options.method}`, `size={size}`", small, data, images, folder))
            print(*rows[-1], sep=" | ", flush=True)
    print(f"\n{machine(options.seed)}\n")
    head = "network,numbers (bytes),file (bytes),in float32 (bytes),load (ms),in float32 (ms),time ÷ in float32"
    print(table([*head.split(","), "top-1 %"], rows))


if __name__ == "__main__":
    main()
