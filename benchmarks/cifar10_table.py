"""Accuracy after each phase on CIFAR-10, all methods at several rates, from one pretrained ResNet-32.

    python -m benchmarks.cifar10_table --data CIFAR --weights resnet32.pt

Every run takes the same number of steps; all accuracies are over the whole test split. Prints a Markdown table with
the machine and the versions. An interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import cifar_run, machine, parser, table, top1
from tspc.decompositions import METHODS

PHASES = ("decompose", "distill", "finetune")


def row(result: dict[str, Any]) -> list[str]:
    phases = result["phases"]
    cells = [result["method"]["name"], f"{result['rate']:g}", f"{result['rate_reached']:.4f}"]
    cells += [f"{result['parameters']['after']:,}", *(top1(phases[p]) for p in PHASES)]
    return cells + [f"{phases[p]['seconds']:.1f}" for p in PHASES]


def summary(results: list[dict[str, Any]]) -> str:
    """Methods × rates."""
    rates = list(dict.fromkeys(result["rate"] for result in results))
    cells: dict[str, dict[float, str]] = {}
    for result in results:
        path = " → ".join(f"{100 * result['phases'][p]['accuracy']['top1']:.1f}" for p in PHASES)
        cells.setdefault(result["method"]["name"], {})[result["rate"]] = path
    rows = [[f"`{method}`", *(row.get(rate, "") for rate in rates)] for method, row in cells.items()]
    return table(["method", *(f"rate {rate:g}" for rate in rates)], rows)


def one_run(options: argparse.Namespace, method: str, rate: str) -> dict[str, Any]:
    steps = (f"phase.distill.steps={options.distill_steps}", f"phase.finetune.steps={options.finetune_steps}")
    return cifar_run(options, f"method={method}", f"rate={rate}", *steps)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--methods", default=",".join(METHODS))
    arguments.add_argument("--rates", default="0.4,0.1")
    arguments.add_argument("--distill-steps", type=int, default=40, help="optimizer steps for each block")
    arguments.add_argument("--finetune-steps", type=int, default=200)
    options = arguments.parse_args()
    pairs = [(method, rate) for rate in options.rates.split(",") for method in options.methods.split(",")]
    results = [one_run(options, method, rate) for method, rate in pairs]
    reference = results[0]["reference"]
    total = sum(phase["seconds"] for result in results for phase in result["phases"].values())
    print(f"\nReference: {top1(reference)} % of {reference['accuracy']['images']:,} test images.")
    print(f"{options.distill_steps} steps a block, then {options.finetune_steps} steps end to end, batches of 128;")
    print(f"{total / 60:.1f} minutes for all phases of all runs. {machine(options.seed)}\n")
    names = ["decompose", "distill", "finetune"]
    head = ["method", "rate", "reached", "parameters", *(f"{n} %" for n in names), *(f"{n} s" for n in names)]
    print(table(head, [row(result) for result in results]))
    print("\nThe same in short, top-1 % after decompose → distill → finetune:\n")
    print(summary(results))


if __name__ == "__main__":
    main()
