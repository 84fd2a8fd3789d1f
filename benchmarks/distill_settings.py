"""Which settings of distillation serve it best: accuracy after phase 1, without finetuning, on CIFAR-10.

    python -m benchmarks.distill_settings --data CIFAR --weights resnet32.pt

One method and rate, the same steps for all. `learning_rate` 0.001 with frozen batch norms is the original's way
(arXiv:1805.10352's code runs its networks in inference mode).
"""

from __future__ import annotations

from benchmarks.common import cifar_run, machine, parser, table, top1


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--method", default="tk")
    arguments.add_argument("--rate", default="0.1")
    arguments.add_argument("--steps", type=int, default=40, help="optimizer steps for each block")
    options = arguments.parse_args()
    rows = []
    out = options.out
    for batch_norm in ("frozen", "updated"):
        for rate in ("0.001", "0.003", "0.01"):
            options.out = f"{out}/distill-{batch_norm}-{rate}"
            settings = [f"phase.distill.{k}={v}" for k, v in (("batch_norm", batch_norm), ("learning_rate", rate))]
            common = (f"method={options.method}", f"rate={options.rate}", "phase=[decompose,distill]")
            result = cifar_run(options, *common, *settings, f"phase.distill.steps={options.steps}")
            phases = result["phases"]
            rows.append([batch_norm, rate, top1(phases["decompose"]), top1(phases["distill"])])
    print(f"\n{options.method} at {options.rate}, {options.steps} steps a block. {machine(options.seed)}\n")
    print(table(["batch_norm", "learning_rate", "decompose %", "distill %"], rows))


if __name__ == "__main__":
    main()
