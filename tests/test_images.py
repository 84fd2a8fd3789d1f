"""Folders of images as people have them: what is taken, what is left out and said, what is refused in a line."""

from __future__ import annotations

import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tests.test_data import CPU, collect, spec, write_images
from tspc.data import load_data
from tspc.data.images import Skipped, middle, opened, scan
from tspc.errors import DataError, TspcWarning

RAMP = np.arange(256, dtype=np.float64).reshape(16, 16) / 255
"""Every value of 8 bits once, as shares of white."""


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path, count=2)


def grey(path):
    return np.asarray(opened(path, 1))


@pytest.mark.parametrize(("ending", "kind"), [("png", np.uint16), ("tif", np.uint16), ("pgm", np.int32)])
def test_sixteen_bits_are_scaled_to_eight(ending, kind, tmp_path):
    path = tmp_path / f"x.{ending}"
    Image.fromarray((RAMP * 65535).round().astype(kind)).save(path)
    assert np.array_equal(grey(path), (RAMP * 255).round())
    assert np.array_equal(np.asarray(opened(path, 3))[..., 1], grey(path))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_known_range_are_refused(kind, tmp_path):
    Image.fromarray((RAMP * 1000).astype(kind)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif .* black and white are not known: save it with 8 or 16 bits"):
        opened(tmp_path / "x.tif", 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_usual_mode_keeps_its_picture(mode, tmp_path):
    picture = Image.fromarray((RAMP * 255).round().astype(np.uint8))
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.convert("RGB").convert(mode).save(path)
    expected = np.asarray(picture.convert("1").convert("L") if mode == "1" else picture).astype(int)
    assert abs(grey(path).astype(int) - expected).max() <= (51 if mode == "P" else 1)  # a palette of few colours
    assert opened(path, 3).mode == "RGB"


def test_transparent_palettes_are_read_without_a_warning(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(tmp_path / "x.png", transparency=b"\x00\x80")
    assert opened(tmp_path / "x.png", 3).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.filterwarnings("ignore::tspc.errors.TspcWarning")
def test_the_images_are_those_that_torchvision_finds(root):
    (root / "train" / "a" / "more" / "still").mkdir(parents=True)
    for place, i in (("more", 0), ("more/still", 1)):
        os.rename(root / "train" / "a" / f"{i}.png", root / "train" / "a" / place / f"{i}.png")
    (root / "train" / "a" / "z.PNG").write_bytes((root / "train" / "b" / "0.png").read_bytes())
    (root / "train" / "b" / "notes.txt").write_text("")
    expected = [(path, label) for path, label in ImageFolder(root / "train").samples]
    assert [(str(path), label) for path, label in scan(root / "train", Skipped())[1]] == expected
    assert len(expected) == 5


def test_hidden_names_are_left_out_and_all_that_is_left_out_is_said_once(root):
    (root / "train" / ".ipynb_checkpoints").mkdir()
    for path in ("train/a/._0.png", "train/a/.DS_Store", "train/b/c.heic", "test/README"):
        (root / path).write_bytes(b"x")
    os.mkfifo(root / "train" / "a" / "pipe.png")
    os.symlink(root / "train", root / "train" / "a" / "again")  # the other class lies below it
    (root / "train" / "lost.png").write_bytes((root / "train" / "b" / "0.png").read_bytes())
    with pytest.warns(TspcWarning) as caught:
        data = load_data(spec("folder", num_classes=2), root)
    assert (data.train_size, data.test_size) == (4, 4)
    (text,) = [str(warning.message) for warning in caught]
    for part in ("2 hidden names (as train/.ipynb", "2 files without", "1 special", "1 links", "1 images beside"):
        assert part in text


def test_a_usual_folder_is_read_without_a_word(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(spec("folder", num_classes=2), root)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def _bomb(path):
    """The beginning of a picture of 50,000 by 50,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100)))]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _named(name, save=True):
    def make(path):
        with open(os.fsencode(path.parent) + b"/" + name, "wb") as file:
            if save:
                Image.new("L", (4, 4)).save(file, "PNG")

    return make


READ, LEFT_OUT, REFUSED = "read", "left out", "refused"
ODD = {
    "one pixel": (READ, lambda p: Image.new("L", (1, 1)).save(p)),
    "thin": (READ, lambda p: Image.new("L", (1, 60000)).save(p)),
    "long name": (READ, _named(b"x" * 240 + b".png")),
    "name that is no text": (READ, _named(b"\xff\xfe.png")),
    "folder": (LEFT_OUT, lambda p: p.mkdir()),
    "pipe": (LEFT_OUT, os.mkfifo),
    "link to a pipe": (LEFT_OUT, lambda p: (os.mkfifo(p.with_name("pipe")), p.symlink_to("pipe"))),
    "link to a device": (LEFT_OUT, lambda p: p.symlink_to("/dev/zero")),
    "socket": (LEFT_OUT, _socket),
    "empty file": (REFUSED, lambda p: p.write_bytes(b"")),
    "text": (REFUSED, lambda p: p.write_text("hello")),
    "drawing": (REFUSED, lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "cut": (REFUSED, lambda p: p.write_bytes(p.with_name("0.png").read_bytes()[:60])),
    "bomb": (REFUSED, _bomb),
    "broken link": (REFUSED, lambda p: p.symlink_to("nowhere.png")),
    "link to itself": (REFUSED, lambda p: p.symlink_to(p)),
    "bad file whose name is no text": (REFUSED, _named(b"odd\xff.png", save=False)),
    "bad file of two lines": (REFUSED, _named(b"odd\n.png", save=False)),
}
"""What may lie in a class folder under an image's name, and what becomes of it."""


@pytest.mark.filterwarnings("ignore::tspc.errors.TspcWarning")
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_read_or_left_out_or_named_in_a_line(kind, in_memory, root, monkeypatch):
    monkeypatch.chdir(root)
    outcome, make = ODD[kind]
    make(root / "test" / "a" / "odd.png")

    def images():
        data = load_data(spec("folder", num_classes=2, in_memory=in_memory, resize=10, workers=0), root)
        return collect(data.test_batches(3, CPU))[0]

    if outcome == REFUSED:
        with pytest.raises(DataError, match=r"/test/a/odd.*") as caught:
            images()
        assert str(caught.value).isprintable()
    else:
        assert images().shape == ((5 if outcome == READ else 4), 3, 8, 8)


def test_a_very_long_image_is_cut_to_its_middle():
    picture = Image.new("L", (2, 1001))
    picture.putpixel((1, 500), 255)
    assert middle(picture).size == (2, 40)
    assert np.asarray(middle(picture)).max() == 255
    assert middle(picture.resize((2, 40))).size == (2, 40)
