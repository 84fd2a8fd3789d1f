"""Images per second of tspc's training loops against a plain torchvision DataLoader with the same augmentation.

    python -m benchmarks.loader --data CIFAR --images IMAGES

Small images (CIFAR-10 as 32×32 files in class folders): padding, random crop and flip, normalisation, batches of 128;
torchvision reads decoded images, too, so that only the loops differ. Large ones (a folder of pictures, taken as two
classes): decoding, random resized crop to 224, flip, batches of 64. Workers: two on both sides for the large ones; for
the small ones the better of none and two for torchvision, none for tspc. Best of --repeats passes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.common import machine, table
from tspc.data import DataSpec, Feed, load_data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def per_second(batches: Callable[[], Iterable[Any]], repeats: int) -> float:
    """Images, of the best pass."""
    best = 0.0
    for _ in range(repeats):
        started, count = time.perf_counter(), 0
        for images, _ in batches():
            count += len(images)
        best = max(best, count / (time.perf_counter() - started))
    return best


class Pictures(Dataset):
    """Decoded images, as torchvision's CIFAR10 holds them."""

    def __init__(self, images: list[Any], labels: list[int], transform: v2.Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def _end() -> list[v2.Transform]:
    return [v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def small(folder: str, repeats: int) -> list[str]:
    spec = DataSpec("folder", "cifar", None, 3, 32, MEAN, STD, pad=4, flip=True)
    data = load_data(spec, folder)
    ours = per_second(lambda: data.train_batches(Feed(128, 0, CPU), 0), repeats)
    source = ImageFolder(str(Path(folder) / "train"))
    import numpy as np

    pixels = [np.asarray(Image.open(path)) for path, _ in source.samples]
    pictures = Pictures(pixels, source.targets, v2.Compose([v2.RandomCrop(32, padding=4), *_end()]))
    loaders = [DataLoader(pictures, 128, shuffle=True, num_workers=n, drop_last=True) for n in (0, 2)]
    theirs = max(per_second(lambda loader=loader: loader, repeats) for loader in loaders)
    return ["CIFAR-10, 32×32", f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.1f}"]


def large(folder: str, repeats: int) -> list[str]:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for number, path in enumerate(sorted(Path(folder).glob("*.jpg"))):
            for split in ("train", "val"):
                place = root / split / str(number % 2)
                place.mkdir(parents=True, exist_ok=True)
                (place / path.name).symlink_to(path.resolve())
        spec = DataSpec("folder", "images", None, 3, 224, MEAN, STD, flip=True, in_memory=False, resize=256, workers=2)
        data = load_data(spec, root)
        ours = per_second(lambda: data.train_batches(Feed(64, 0, CPU), 0), repeats)
        plain = ImageFolder(str(root / "train"), v2.Compose([v2.RandomResizedCrop(224), *_end()]))
        loader = DataLoader(plain, 64, shuffle=True, num_workers=2, drop_last=True)
        theirs = per_second(lambda: loader, repeats)
    return ["ImageNet, 224×224", f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.1f}"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", help="CIFAR-10 with train/ and test/")
    arguments.add_argument("--images", help="a folder of JPEG pictures")
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    rows = [small(options.data, options.repeats)] if options.data else []
    rows += [large(options.images, options.repeats)] if options.images else []
    print(f"{torch.get_num_threads()} threads. {machine(0)}\n")
    print(table(["images", "torchvision, images/s", "tspc, images/s", "ratio"], rows))


if __name__ == "__main__":
    main()
