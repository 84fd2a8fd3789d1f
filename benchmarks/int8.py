"""Exported files with 8-bit integers: their accuracy in ONNX Runtime and in OpenVINO, and their bytes. ResNet-32.

    pip install -e '.[onnx,openvino]'
    python -m benchmarks.int8 --data CIFAR --weights resnet32.pt [--methods svd,cp --rate 0.2]

Factors in 8 bits, in function space with 512 images, no training; 256 training images show the ranges of the
activations. "Paths": `rebuilt` writes the dense kernels, `factors` the links of the chain where a method has them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import tspc
from benchmarks.common import calibration_images, cifar_reference, machine, parser, table
from tspc.data import Data
from tspc.deploy.calls import FLOAT32
from tspc.deploy.runtimes import Answering, opened, openvino_session, run_openvino
from tspc.layers.chains import CHAIN, REBUILT
from tspc.layers.forms import tensorized_layers
from tspc.training import accuracy
from tspc.traversal.copying import copied

BATCH = 250
CPU = torch.device("cpu")


def in_onnx(path: Path, format: str) -> nn.Module:
    return Answering(opened(path, format, torch.get_num_threads()))


def in_openvino(path: Path, example: Tensor) -> nn.Module:
    request = openvino_session(path, (example,), FLOAT32, torch.get_num_threads())
    return Answering(lambda inputs: run_openvino(request, inputs))


def on_path(model: nn.Module, path: str) -> nn.Module:
    found = copied(model)
    for layer in tensorized_layers(found).values():
        layer.path = path if path in layer.paths else layer.path
    return found


def row(name: str, model: nn.Module, data: Data, calibration: list[Tensor]) -> list[str]:
    """The accuracy of the network, of its float32 file and of its int8 file, and the bytes of both files."""

    def top1(network: nn.Module) -> float:
        return 100 * accuracy(network.eval(), data.test_batches(BATCH, CPU), data.num_classes, CPU).top1

    example = torch.cat(calibration)[:BATCH].contiguous()
    with tempfile.TemporaryDirectory() as folder:
        plain, int8 = Path(folder, "model.onnx"), Path(folder, "model.int8.onnx")
        tspc.export(model, plain, example)
        made = tspc.export(model, int8, example, calibration=calibration)
        own = top1(model)
        found = [top1(in_onnx(plain, "onnx")), top1(in_onnx(int8, "int8")), top1(in_openvino(int8, example))]
        cells = [f"{own:.2f}", *(f"{value:.2f} ({value - own:+.2f})" for value in found)]
        assert made.int8 is not None
        in_float = " and ".join(made.int8.float_layers) or "none"
        return [name, *cells, *(f"{path.stat().st_size:,}" for path in (plain, int8)), in_float]


def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--methods", default="dense,svd,cp,tk,tt,rcp,rtk,rtt")
    arguments.add_argument("--rate", type=float, default=0.2)
    options = arguments.parse_args()
    _, data, model = cifar_reference(options)
    images = calibration_images(data, 512, 512, CPU)
    calibration = list(images[:256].split(32))
    rows = [row("dense, float32", model.eval(), data, calibration)]
    for method in options.methods.split(","):
        rate = {} if method == "dense" else {"rate": options.rate}
        small = tspc.compress(model, method, bits=8, calibration=images, **rate).eval()
        paths = {path for layer in tensorized_layers(small).values() for path in layer.paths}
        for path, label in ((CHAIN, "factors"), (REBUILT, "rebuilt")):
            if path in paths and not (method == "dense" and path == CHAIN):
                name = f"`{method}`" if method == "dense" else f"`{method}`, {options.rate:g}, {label}"
                rows.append(row(name, on_path(small, path), data, calibration))
                print(*rows[-1], sep=" | ", flush=True)
    print(f"\n{machine(options.seed)}\n")
    files = ["float32 file in ONNX Runtime", "int8 file in ONNX Runtime", "int8 file in OpenVINO"]
    print(table(["network", "top-1 %", *files, "bytes, float32", "bytes, int8", "layers in float32"], rows))


if __name__ == "__main__":
    main()
