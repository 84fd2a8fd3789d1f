"""Whole calls of the command: `max_drop=…` beside a size alone. ResNet-32, CIFAR-10 (JPEG), phase 0.

    python -m benchmarks.search_calls --data CIFAR --weights resnet32.pt [--methods svd,auto --limits 0.5,1,2,5]

Every call is a process of its own, with an empty output directory. It starts Python, reads the data, judges the
reference and the result on the 10,000 test images, and writes its files. Without --seconds wall the seconds are those
of the processor, so that other work on the machine does not count. Every call is kept in --out, and not repeated.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import cifar_overrides, kept, machine, parser, table

SIZE = "0.1"
"""Of the call that has a size."""


def call(options: argparse.Namespace, method: str, goal: str) -> dict[str, Any]:
    """The seconds of a call."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*cifar_overrides(options, folder), "phase=[decompose]", f"method={method}", goal]
        threads = {"OMP_NUM_THREADS": str(options.threads)}
        before, started = _processor(), time.monotonic()
        subprocess.run([sys.executable, "-m", "tspc", *given], check=True, env=os.environ | threads)
        return {"wall": time.monotonic() - started, "processor": _processor() - before}


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(out="outputs/search_calls")
    arguments.add_argument("--methods", default="svd,auto")
    arguments.add_argument("--limits", default="0.5,1,2,5")
    arguments.add_argument("--seconds", choices=("processor", "wall"), default="processor")
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    rows = []
    for method in options.methods.split(","):
        first = 0.0
        goals = [f"size={SIZE}", *(f"max_drop={limit}" for limit in options.limits.split(",") if limit)]
        for goal in goals:
            name = f"{method}-{goal}-threads{options.threads}-seed{options.seed}"
            found = kept(Path(options.out), name, partial(call, options, method, goal))
            seconds = found[options.seconds]
            first = first or seconds
            rows.append([f"`{method}`", f"`{goal}`", f"{seconds:.0f}", f"{seconds / first:.2f}"])
    print(f"\n{machine(options.seed)} {options.threads} threads; seconds: {options.seconds}.\n")
    print(table(["method", "goal", "seconds of the call", "of the call with a size"], rows))


if __name__ == "__main__":
    main()
