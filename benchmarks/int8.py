"""Int8 weights (torchao, weight only) on a compressed ResNet-32: accuracy and bytes before and after.

    python -m benchmarks.int8 --data CIFAR --weights resnet32.pt [--methods cp,tt --rates 0.2,0.1]

Decomposition in function space with 512 images, no training. torchao quantises dense layers; here that is the last one.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.common import cifar_reference, machine, parser, table
from tspc.calibration.samples import Calibration
from tspc.compression.apply import compress
from tspc.data import Data
from tspc.training import evaluate
from tspc.traversal.copying import copied


def quantised(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    small = copied(model)
    quantize_(small, Int8WeightOnlyConfig())
    return small


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, as torchao keeps them."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        sum(getattr(t, name).nbytes for name in ("qdata", "scale")) if hasattr(t, "qdata") else t.nbytes
        for t in tensors
    )


def row(name: str, model: nn.Module, data: Data) -> list[str]:
    cpu, small = torch.device("cpu"), quantised(model)
    tops = [f"{100 * evaluate(network, data, cpu).top1:.2f}" for network in (model, small)]
    return [name, *tops, *(f"{held_bytes(network):,}" for network in (model, small))]


def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--methods", default="svd,tk,cp")
    arguments.add_argument("--rates", default="0.2")
    options = arguments.parse_args()
    _, data, model = cifar_reference(options)
    images = torch.cat(list(data.calibration_batches(512, 512, torch.device("cpu"))))
    rows = [row("dense", model.eval(), data)]
    for method in options.methods.split(","):
        for rate in map(float, options.rates.split(",")):
            small = compress(model, method, rate, calibration=images, settings=Calibration(samples=512))
            rows.append(row(f"{method}, {rate:g}", small.eval(), data))
            print(rows[-1], flush=True)
    print(f"\n{machine(options.seed)}\n")
    print(table(["network", "top-1, float32", "top-1, int8 weights", "bytes, float32", "bytes, int8 weights"], rows))


if __name__ == "__main__":
    main()
