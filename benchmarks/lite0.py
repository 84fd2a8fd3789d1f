"""EfficientNet-Lite0 with its ImageNet weights: before, without training, and after a short distillation.

    python -m benchmarks.lite0 --data IMAGES [--method auto --rates 0.8,0.7,0.6 --sizes 0.25,0.15,0.1]

IMAGES is a folder with one ImageNet image a class, in the order of the classes. 900 of them, without their labels,
calibrate and train: phase 2 by the reference's answers and activations alone, without phase 1, whose blocks learn so
few images by heart. The other 100 are never seen: their classes have no training image. Accuracies are top-1 of the 900
and of the 100, centre crops of 224 pixels. Shares are those of the float32 bytes. Every goal is kept in --out, and not
repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.common import calibration_images, machine, table
from benchmarks.no_training import lite0_network
from tspc.calibration.samples import Calibration
from tspc.compression.compress import compress
from tspc.compression.integers import state_bytes
from tspc.data import Data, DataSpec
from tspc.data.base import InMemory
from tspc.phases.context import Context
from tspc.phases.finetune import Finetuning, finetune
from tspc.store.files import write_json
from tspc.terminal.display import Display
from tspc.training import Hardware, Progress, accuracy, evaluate, place

CPU = torch.device("cpu")
SEEN = 900
SPEC = DataSpec("lite0", "imagenet", 1000, 3, 224, (0.498,) * 3, (0.502,) * 3, pad=16, flip=True)


def read(folder: Path, seed: int) -> InMemory:
    """The images that train, and as the test split those that are never seen."""
    paths = sorted(folder.glob("*.jpg"))
    images = torch.stack([_pixels(path) for path in paths])
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[:SEEN], order[SEEN:]
    return InMemory(SPEC, len(paths), (images[seen], seen), (images[unseen], unseen))


def _pixels(path: Path) -> Tensor:
    size = SPEC.image_size
    with Image.open(path) as image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        cropped = image.convert("RGB").crop((left, top, left + size, top + size))
        return torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1)


def accuracies(model: nn.Module, data: Data) -> list[float]:
    """Top-1 in percent of the images that train, and of the others."""
    seen = accuracy(model, data.held_out_batches(data.train_size, 50, CPU), data.num_classes, CPU)
    return [100 * seen.top1, 100 * evaluate(model, data, CPU).top1]


def cell(reference: nn.Module, data: Data, goal: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    recipe = f"{options.calibration}-{options.epochs}x{options.batch}-{options.learning_rate:g}"
    ((kind, value),) = goal.items()
    told = f"{value:g}" if kind == "rate" else f"size-{value}"
    path = Path(options.out) / f"{options.method}-{told}-{recipe}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {}
        started = time.monotonic()

        def note(phase: str) -> None:
            nonlocal started
            found[phase] = {"seconds": time.monotonic() - started, "top1": accuracies(model, data)}
            print(f"{options.method} {told} {phase}: {found[phase]}", flush=True)
            started = time.monotonic()

        images = calibration_images(data, options.calibration, 50, CPU)
        calibration = Calibration(samples=options.calibration, compensate=False)
        model = compress(reference, options.method, calibration=images, settings=calibration, **goal)
        place(model, CPU)
        note("decompose")
        context = Context(data, Hardware(CPU), options.seed, Display(is_silent=True))
        settings = Finetuning(
            epochs=options.epochs,
            batch_size=options.batch,
            learning_rate=options.learning_rate,
            optimizer="adam",
            warmup=0.1,
            distillation=1.0,
            features=1.0,
            careful_below=0.0,
            held_out=0,
        )
        finetune(model, reference, settings, context, Progress(), "finetune")
        note("finetune")
        found["share"] = state_bytes(model) / state_bytes(reference)
        write_json(path, found)
    return json.loads(path.read_text()) | {"goal": f"{kind} {value}"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", required=True, help="folder with one ImageNet image a class")
    arguments.add_argument("--method", default="auto")
    arguments.add_argument("--rates", default="0.8,0.7,0.6")
    arguments.add_argument("--sizes", default="0.25,0.15,0.1", help="in few bits, as shares of the bytes")
    arguments.add_argument("--calibration", type=int, default=512, help="of the 900 images, for phase 0")
    arguments.add_argument("--epochs", type=int, default=2, help="of finetuning")
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--learning-rate", type=float, default=1.5e-4)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", default="outputs/lite0")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    reference = place(lite0_network(), CPU).eval()
    data = read(Path(options.data), options.seed)
    before = accuracies(reference, data)
    goals: list[dict[str, Any]] = [{"rate": float(rate)} for rate in options.rates.split(",") if rate]
    goals += [{"size": size} for size in options.sizes.split(",") if size]
    cells = [cell(reference, data, goal, options) for goal in goals]
    print(f"\n{machine(options.seed)}\n")
    phases = ("decompose", "finetune")
    rows = [["the original", "1.000", *(f"{before[0]:.2f} / {before[1]:.0f}",) * len(phases), ""]]
    for found in cells:
        tops = [f"{found[phase]['top1'][0]:.2f} / {found[phase]['top1'][1]:.0f}" for phase in phases]
        seconds = f"{sum(found[phase]['seconds'] for phase in phases):.0f}"
        rows.append([found["goal"], f"{found['share']:.3f}" if "share" in found else "", *tops, seconds])
    print(table(["goal", "share of the bytes", *(f"{phase}: seen / unseen %" for phase in phases), "seconds"], rows))


if __name__ == "__main__":
    main()
