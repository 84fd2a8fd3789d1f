"""Images on disk: finds the files of a folder, and converts each to 8 bits a channel."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from tspc.errors import DataError, TspcWarning, shortened

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
Samples = list[tuple[Path, int]]
WIDEST = 20
"""If the longer side divided by the shorter side is above this, only the middle of the image is used."""
_HIDDEN, _OTHERS, _SPECIAL, _LOOPS = (
    "hidden names",
    "files without an image's ending",
    "special files (pipes, devices)",
    "links to a folder above",
)


class Skipped:
    """The files that are left out of a data set, for one warning about them."""

    def __init__(self) -> None:
        self._found: dict[str, list[Path]] = defaultdict(list)

    def add(self, kind: str, path: Path) -> None:
        self._found[kind].append(path)

    def tell(self, root: Path) -> None:
        """Warns once of all of them, with an example of each kind."""
        kinds = [
            f"{len(paths)} {kind} (as {shown(min(paths).relative_to(root))})" for kind, paths in self._found.items()
        ]
        if kinds:
            warnings.warn(f"data_dir={shown(root)}: left out are {', '.join(kinds)}", TspcWarning, stacklevel=2)


def shown(path: Path) -> str:
    """A path in a message; file names may be invalid text."""
    return shortened(str(path), 300)


def scan(folder: Path, skipped: Skipped) -> tuple[list[str], Samples]:
    """Classes and images of a folder that has a folder for each class, both sorted.

    As in torchvision's ImageFolder, images may lie in deeper folders, and links are followed. Hidden names and special
    files are skipped. Raises DataError for a folder that cannot be read, a class without images, or a broken link.
    """
    folders, files = _entries(folder, skipped)
    for path in files:
        skipped.add("images beside the class folders", path)
    if not folders:
        raise DataError(f"{shown(folder)} has no class folders")
    samples: Samples = []
    for label, path in enumerate(folders):
        images = sorted(
            _below(path, skipped, (_identity(folder), _identity(path))),
            key=lambda image: (str(image.parent), image.name),
        )
        if not images:
            raise DataError(f"{shown(path)} has no images ({', '.join(sorted(EXTENSIONS))})")
        samples += [(image, label) for image in images]
    return [path.name for path in folders], samples


def _below(folder: Path, skipped: Skipped, above: tuple[tuple[int, int], ...]) -> list[Path]:
    folders, images = _entries(folder, skipped)
    for path in folders:
        identity = _identity(path)
        if identity in above:
            skipped.add(_LOOPS, path)
        else:
            images += _below(path, skipped, (*above, identity))
    return images


def _entries(folder: Path, skipped: Skipped) -> tuple[list[Path], list[Path]]:
    """The folders and the images directly in a folder."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = folder / entry.name
                is_image = path.suffix.lower() in EXTENSIONS
                if entry.name.startswith("."):
                    if is_image or entry.is_dir():
                        skipped.add(_HIDDEN, path)
                elif entry.is_dir():
                    folders.append(path)
                elif not is_image:
                    skipped.add(_OTHERS, path)
                elif entry.is_file():
                    images.append(path)
                elif entry.is_symlink() and not path.exists():
                    raise DataError(f"{shown(path)} is a link to a file that is not there; mend or remove it")
                else:
                    skipped.add(_SPECIAL, path)
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if error.filename else folder
        raise DataError(f"{shown(place)} cannot be read: {error.strerror}") from error
    return folders, images


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    return found.st_dev, found.st_ino


def opened(path: Path, channels: int) -> Image.Image:
    """The image in grey (one channel) or RGB with 8 bits; transparency is dropped, and 16 bits are scaled.

    Raises DataError if it cannot be read, or if the range of its values is unknown.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _in_eight_bits(image).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        reason = shortened(str(error) or type(error).__name__, 200)
        raise DataError(f"{shown(path)} is not a readable image ({reason}); remove or replace it") from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:
        largest = 2 ** _bits(image) - 1
        values = np.asarray(image).astype(np.float32)
        return Image.fromarray(np.rint(values * (255 / largest)).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its values are {kind}, whose black and white are not known: save it with 8 or 16 bits")
    # Palettes with a transparency of their own go through RGBA, or Pillow warns.
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _bits(image: Image.Image) -> int:
    """The number of bits that a 16-bit image uses; in a TIFF it may be 12."""
    told = getattr(image, "tag_v2", {}).get(258, 16)  # BitsPerSample
    return int(told[0] if isinstance(told, tuple) else told)


def middle(image: Image.Image) -> Image.Image:
    """The image, or the middle of a very long one, which could fill the memory when its shorter side is scaled."""
    width, height = image.size
    longest = WIDEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
