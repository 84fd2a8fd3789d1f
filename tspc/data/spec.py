"""The description of a data set of images, and of how they are prepared for the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tspc.system.bounds import SEEDS, Allowed, Bounds, described, out_of_range, shown, unknown

NO_DATA = "none"
"""The kind for a run without data."""
IMAGES_IN_FOLDERS = ("idx", "cifar10", "folder")
OTHER_KINDS = ("text", "datasets", "factory")
"""Those that are no images; see `tspc.data.text_spec`."""
KINDS_IN_FOLDERS = (*IMAGES_IN_FOLDERS, *OTHER_KINDS)
"""Those that read a data_dir."""
LOADED_KINDS = ("digits", "synthetic", *IMAGES_IN_FOLDERS)
"""Those of images."""
OPTIONS: dict[str, dict[str, Allowed]] = {
    "idx": {"torchvision": ("MNIST", "FashionMNIST", "KMNIST", "QMNIST")},
    "synthetic": {"train": Bounds(1, 1e8), "test": Bounds(1, 1e8), "seed": SEEDS},
}
"""The `options` that a kind needs, and their allowed values."""
PIXELS = Bounds(1, 16384)


@dataclass(frozen=True)
class DataSpec:
    """A data set, and how its images are prepared for the network.

    `kind` names the loader. `num_classes` may be None if the class folders give it. `mean` and `std` are per channel,
    for pixel values in [0, 1]. `pad` (pixels of random shift) and `flip` are the training augmentation of small images.
    `in_memory` keeps all images decoded, as uint8.
    """

    kind: str
    name: str
    num_classes: int | None
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False
    in_memory: bool = True
    resize: int | None = None
    workers: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        kinds = (*LOADED_KINDS, NO_DATA)
        known = ", ".join((*kinds, *OTHER_KINDS))
        found = [] if self.kind in kinds else [f"{where}.kind={shown(self.kind)}: choose one of {known}"]
        bounds = {
            "num_classes": Bounds(1, 1e7),
            "channels": Bounds(1, 1000),
            "image_size": PIXELS,
            "pad": Bounds(0, max(0, self.image_size)),
            "resize": PIXELS,
            "workers": Bounds(0, 1000),
        }
        found += out_of_range(self, where, bounds)
        for name, allowed in (("mean", Bounds(-1e6, 1e6)), ("std", Bounds(1e-6, 1e6))):
            values = getattr(self, name)
            if len(values) not in (1, self.channels) or any(value not in allowed for value in values):
                count = "1 number" if self.channels == 1 else f"1 or {self.channels} numbers"
                found.append(f"{where}.{name}={shown(values)}: expected {allowed.of(count)}")
        return found + self._wrong_options(f"{where}.options")

    def _wrong_options(self, where: str) -> list[str]:
        needed = OPTIONS.get(self.kind, {})
        found = unknown(self.options, needed, f"{where}.")
        for key, value in self.options.items():
            if key in needed and not _fits(value, needed[key]):
                found.append(f"{where}.{key}={shown(value)}: expected {described(needed[key])}")
        missing = [key for key in needed if key not in self.options]
        return [*found, *([f"{where} lacks {', '.join(missing)}"] if missing else [])]


def _fits(value: Any, allowed: Allowed) -> bool:
    if isinstance(allowed, Bounds):
        return value in allowed and value == int(value)
    return isinstance(value, str) and value in allowed
