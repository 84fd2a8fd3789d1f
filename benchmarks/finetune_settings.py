"""What careful steps are worth where a network is close to its reference already: accuracy after finetuning, CIFAR-10.

    python -m benchmarks.finetune_settings --data CIFAR --weights resnet32.pt [--rates 0.4,0.2 --steps 100]

One method from the compensated start, without phase 1; the last state counts, not the best one.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import cifar_run, machine, parser, table, top1

VALUES = ("0.3", "0")
"""Of `careful_below`: the default, and without it."""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--method", default="tt")
    arguments.add_argument("--rates", default="0.4,0.2")
    arguments.add_argument("--steps", type=int, default=100)
    options = arguments.parse_args()

    def run(rate: str, careful_below: str) -> dict[str, Any]:
        given = {"steps": options.steps, "held_out": 0, "careful_below": careful_below}
        settings = [f"phase.finetune.{key}={value}" for key, value in given.items()]
        variant = f"variant=finetune-{careful_below}-{options.steps}"
        common = (f"method={options.method}", f"rate={rate}", "phase=[decompose,finetune]")
        return cifar_run(options, variant, *common, *settings)["phases"]

    rows = []
    for rate in options.rates.split(","):
        found = [run(rate, value) for value in VALUES]
        rows.append([rate, top1(found[0]["decompose"]), *(top1(phases["finetune"]) for phases in found)])
    print(f"\n{options.method}, {options.steps} steps end to end. {machine(options.seed)}\n")
    print(table(["rate", "decompose %", *(f"finetune %, `careful_below={value}`" for value in VALUES)], rows))


if __name__ == "__main__":
    main()
