"""The small data sets with fixed files: digits, MNIST and Fashion-MNIST, CIFAR-10, and a synthetic one."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tspc.data.base import Batch, DataSpec, InMemory, existing
from tspc.errors import DataError

DEFAULT_DIR = Path("data")
"""Where downloads go when no data_dir is given."""


def digits(spec: DataSpec, data_dir: Path | None, download: bool) -> InMemory:
    """1,797 handwritten digits of 8×8 pixels, from scikit-learn; every fifth is a test image."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    # The images come in the order of their writers; a fixed permutation mixes them before the split.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(images) // 5], order[len(images) // 5 :]
    return InMemory(spec, _classes(spec, 10), (images[train], targets[train]), (images[test], targets[test]))


def synthetic(spec: DataSpec, data_dir: Path | None, download: bool) -> InMemory:
    """Seeded images that a network can learn: a smooth random pattern for each class, with noise."""
    classes, size, channels = _classes(spec, spec.num_classes or 10), spec.image_size, spec.channels
    generator = torch.Generator().manual_seed(int(spec.options.get("seed", 0)))
    coarse = torch.randn(classes, channels, math.ceil(size / 4), math.ceil(size / 4), generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")

    def split(count: int) -> Batch:
        labels = torch.randint(classes, (count,), generator=generator)
        noise = torch.randn(count, channels, size, size, generator=generator)
        images = 128 + 40 * patterns[labels] + 40 * noise
        return images.clamp(0, 255).to(torch.uint8), labels

    return InMemory(spec, classes, split(int(spec.options["train"])), split(int(spec.options["test"])))


def idx(spec: DataSpec, data_dir: Path | None, download: bool) -> InMemory:
    """MNIST and its relatives: four idx files, plain or gzipped, in `data_dir` or as torchvision lays them out."""
    folder = _find_idx(spec, data_dir, download)
    splits = []
    for prefix in ("train", "t10k"):
        images = _read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"))
        labels = _read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte")).long()
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} {prefix} images but {len(labels)} labels; fetch the files again")
        splits.append((images[:, None], labels))
    return InMemory(spec, _classes(spec, 10), splits[0], splits[1])


def cifar10(spec: DataSpec, data_dir: Path | None, download: bool) -> InMemory:
    """CIFAR-10's original pixels, as torchvision reads and downloads them."""
    from torchvision.datasets import CIFAR10

    root = existing(data_dir) or DEFAULT_DIR
    splits = []
    for train in (True, False):
        try:
            missing = not (root / "cifar-10-batches-py").exists()
            data = CIFAR10(str(root), train=train, download=download and missing)
        except (OSError, RuntimeError) as error:
            remove_if_empty(root)
            raise DataError(
                f"cifar10: not in {root}, and not downloaded ({error}); unpack cifar-10-python.tar.gz there, "
                "or use dataset=imagefolder for a folder of images"
            ) from error
        images = torch.from_numpy(np.asarray(data.data)).permute(0, 3, 1, 2).contiguous()
        splits.append((images, torch.tensor(data.targets)))
    return InMemory(spec, _classes(spec, 10), splits[0], splits[1])


def remove_if_empty(folder: Path) -> None:
    """Removes the folder if it is empty, so that a failed download leaves nothing behind."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder == DEFAULT_DIR and folder.is_dir() else []:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if folder == DEFAULT_DIR and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _classes(spec: DataSpec, expected: int) -> int:
    if spec.num_classes not in (None, expected):
        raise DataError(f"dataset.num_classes={spec.num_classes}, but {spec.name} has {expected} classes")
    return expected


def _find_idx(spec: DataSpec, data_dir: Path | None, download: bool) -> Path:
    import torchvision.datasets

    reader = getattr(torchvision.datasets, spec.options["torchvision"])
    root = existing(data_dir) or DEFAULT_DIR
    for folder in (root, root / reader.__name__ / "raw"):
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    try:
        reader(str(root), download=download)
    except (OSError, RuntimeError) as error:
        remove_if_empty(root)
        raise DataError(
            f"{spec.name}: not in {root}, and not downloaded ({error}); put the four files "
            "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz into a folder and pass it as data_dir"
        ) from error
    return root / reader.__name__ / "raw"


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {name} or {name}.gz")


def _read_idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes: 2 zero bytes, type 8, number of axes, big-endian sizes, values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = int.from_bytes(data[:2], "big"), data[2], data[3]
        shape = np.frombuffer(data, ">i4", axes, 4).tolist()
        values = np.frombuffer(data, np.uint8, -1, 4 + 4 * axes)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); fetch it again") from error
    if zero != 0 or kind != 8 or values.size != math.prod(shape):
        raise DataError(f"{path} is not a whole idx file of bytes; fetch it again")
    return torch.from_numpy(values.reshape(shape).copy())
