"""How long each runtime needs for the parts of a convolution, in multiply-adds of this runtime on one core.

`python -m benchmarks.fit_costs` fits the numbers to times on a CPU with AVX-512 and 8-bit products, without AMX.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one convolution takes besides its multiply-adds, which have channels in multiples of `inputs`, `outputs`.

    `entry` is for an entry of the input map or of the output map, which 8-bit runtimes round. `weight` is for an entry
    of the kernel, and `call` for the operation itself; both are once for a batch.
    """

    inputs: int
    outputs: int
    entry: float
    weight: float
    call: float


EAGER = Work(16, 16, 32.0, 32.0, 2e5)
WORK = {
    "eager": EAGER,
    "compile": EAGER,
    "onnx": Work(16, 16, 2.5, 52.0, 0.0),
    "onnx-int8": Work(16, 32, 8.4, 19.0, 3.3e4),
    "openvino": Work(1, 16, 2.3, 0.0, 0.0),
    "openvino-bfloat16": Work(1, 16, 0.0, 64.0, 0.0),
    "openvino-int8": Work(1, 1, 12.0, 0.0, 9.6e5),
}
"""For each of `tspc.deploy.RUNTIMES`."""


def rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
