"""How long each runtime needs for the parts of a convolution, in multiply-adds of this runtime on one core.

`python -m benchmarks.fit_costs` fits the numbers to times on a CPU with AVX-512.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one convolution takes besides its multiply-adds, which have channels in multiples of `inputs`, `outputs`.

    `read`, `written` and `weight` are for an entry of the input map, of the output map and of the kernel; `call` is for
    the operation itself, once for a batch.
    """

    inputs: int
    outputs: int
    read: float
    written: float
    weight: float
    call: float


EAGER = Work(16, 16, 32.0, 32.0, 32.0, 2e5)
WORK = {
    "eager": EAGER,
    "compile": EAGER,
    "onnx": EAGER,
    "onnx-int8": Work(4, 16, 11.0, 43.0, 15.0, 2.8e6),
    "openvino": EAGER,
    "openvino-bfloat16": EAGER,
    "openvino-int8": EAGER,
}
"""The runtimes of `tspc.deploy.RUNTIMES`."""


def rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
