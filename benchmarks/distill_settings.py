"""Which settings of distillation serve it best: accuracy after phase 1, without finetuning, on CIFAR-10.

    python -m benchmarks.distill_settings --data CIFAR --weights resnet32.pt [--method svd --first 1]

One method and rate, the same steps for all, no early end.
"""

from __future__ import annotations

from benchmarks.common import cifar_run, machine, parser, table, top1

CHANGES: list[dict[str, str]] = [
    {},
    {"batch_norm": "frozen"},
    {"learning_rate": "0.001"},
    {"learning_rate": "0.01"},
    {"inputs": "parallel"},
    {"inputs": "mixed"},
]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--method", default="tk")
    arguments.add_argument("--rate", default="0.1")
    arguments.add_argument("--steps", type=int, default=40, help="optimizer steps for each block")
    arguments.add_argument(
        "--first", type=int, default=len(CHANGES), help="so many of the settings, from the default on"
    )
    options = arguments.parse_args()
    rows = []
    for changes in CHANGES[: options.first]:
        variant = f"variant=distill-{'-'.join(changes.values()) or 'default'}"
        given = [f"phase.distill.{k}={v}" for k, v in ({"least_gain": "0"} | changes).items()]
        common = (f"method={options.method}", f"rate={options.rate}", "phase=[decompose,distill]")
        result = cifar_run(options, variant, *common, *given, f"phase.distill.steps={options.steps}")
        phases = result["phases"]
        named = ", ".join(f"`{k}={v}`" for k, v in changes.items()) or "default"
        rows.append([named, top1(phases["decompose"]), top1(phases["distill"]), f"{phases['distill']['seconds']:.0f}"])
    print(f"\n{options.method} at {options.rate}, {options.steps} steps a block. {machine(options.seed)}\n")
    print(table(["settings", "decompose %", "distill %", "seconds"], rows))


if __name__ == "__main__":
    main()
