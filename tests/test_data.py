"""Data sets: what comes out of them, that every test image counts once, and what damaged ones say."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from tspc.data import DataSpec, Feed, load_data
from tspc.errors import DataError
from tspc.system.processes import Share

CPU = torch.device("cpu")


def spec(kind: str, **changes) -> DataSpec:
    values = {"name": kind, "num_classes": 10, "channels": 3, "image_size": 8, "mean": (0.5,), "std": (0.25,)}
    return DataSpec(kind, **values | changes)


def write_images(root, size=8, classes=("a", "b"), splits=("train", "test"), count=4):
    generator = np.random.default_rng(0)
    for split in splits:
        for label in classes:
            (root / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def write_idx(folder, count=20, labels=None):
    for prefix in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 5, 5))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(count * 25)))
        values = bytes(labels or [i % 10 for i in range(count)])
        header = bytes([0, 0, 8, 1]) + len(values).to_bytes(4, "big")
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + values)
    return folder


def collect(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits():
    data = load_data(spec("digits", channels=1))
    assert (data.train_size, data.test_size, data.num_classes) == (1438, 359, 10)
    images, labels = collect(data.test_batches(100, CPU))
    assert images.shape == (359, 1, 8, 8)
    assert labels.bincount(minlength=10).min() > 20, "every digit is in the test split"


def test_batches_repeat_with_the_seed_and_change_with_the_epoch():
    data = load_data(spec("digits", channels=1, pad=1, flip=True))
    first, again, other = (collect(data.train_batches(Feed(64, 5, CPU), epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])
    assert len(first[1]) == data.steps(Feed(64, 5, CPU)) * 64


@pytest.fixture(params=["in memory", "streamed"])
def pictures(request, tmp_path):
    """Ten training images a class, each unlike all others."""
    root = write_images(tmp_path, size=12, count=10)
    streamed = request.param == "streamed"
    changes = {"in_memory": False, "resize": 10, "workers": 0} if streamed else {"pad": 1}
    return load_data(spec("folder", num_classes=2, flip=True, **changes), root)


def test_a_pass_can_be_entered_at_any_batch(pictures):
    feed = Feed(6, 3, CPU)
    whole = [images for images, _ in pictures.train_batches(feed, 1)]
    rest = [images for images, _ in pictures.train_batches(feed, 1, start=2)]
    assert len(whole) == 3
    assert torch.equal(rest[0], whole[2])


def test_processes_share_every_batch(pictures):
    whole = [(images, labels) for images, labels in pictures.train_batches(Feed(6, 3, CPU), 1)]
    parts = [list(pictures.train_batches(Feed(6, 3, CPU, share=Share(p, 2)), 1)) for p in range(2)]
    for (images, labels), *own in zip(whole, *parts, strict=True):
        for process, (some, theirs) in enumerate(own):
            assert torch.equal(some, images[process::2]), "the same images, augmented alike"
            assert torch.equal(theirs, labels[process::2])
    counted = [len(labels) for p in range(3) for _, labels in pictures.test_batches(4, CPU, None, Share(p, 3))]
    assert sum(counted) == pictures.test_size, "uneven shares count every image once"


def test_held_out_images_are_never_trained_on(tmp_path):
    data = load_data(spec("folder", num_classes=2), write_images(tmp_path, count=10))
    feed = Feed(4, 0, CPU, held_out=6)
    assert data.steps(feed) == 3
    held_out = collect(data.held_out_batches(6, 4, CPU))[0].flatten(1)
    trained = torch.cat([collect(data.train_batches(feed, epoch))[0] for epoch in range(6)]).flatten(1)
    assert len(held_out) == 6
    assert not (held_out[:, None] == trained[None]).all(2).any()
    assert len(trained.unique(dim=0)) == 14


def test_pad_and_flip_move_pixels_only():
    data = load_data(spec("digits", channels=1, pad=1, mean=(0.0,), std=(1.0,)))
    plain = load_data(spec("digits", channels=1, mean=(0.0,), std=(1.0,)))
    moved, original = (next(iter(d.train_batches(Feed(512, 0, CPU), 0))) for d in (data, plain))
    inner = original[0][:, :, 1:-1, 1:-1]
    shifted = [original[0][:, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    matches = torch.stack([(moved[0][:, :, 1:-1, 1:-1] == s).flatten(1).all(1) for s in shifted])
    assert matches.any(0).all()
    assert 0.02 < float((moved[0][:, :, 1:-1, 1:-1] == inner).flatten(1).all(1).float().mean()) < 0.5


def test_every_test_image_once_and_a_fixed_subset():
    data = load_data(spec("synthetic", options={"train": 50, "test": 37}))
    assert collect(data.test_batches(10, CPU))[0].shape[0] == 37
    once, again = (collect(data.test_batches(10, CPU, limit=20))[0] for _ in range(2))
    assert torch.equal(once, again)
    assert len(once) == 20


def test_a_batch_larger_than_the_data_is_the_whole_data():
    data = load_data(spec("synthetic", options={"train": 50, "test": 20}))
    assert [len(labels) for _, labels in data.train_batches(Feed(128, 0, CPU), 0)] == [50]


@pytest.mark.parametrize("in_memory", [True, False])
def test_image_folder(in_memory, tmp_path):
    root = write_images(tmp_path, size=12)
    data = load_data(spec("folder", num_classes=None, in_memory=in_memory, resize=10, workers=0), root)
    assert (data.num_classes, data.train_size, data.test_size) == (2, 8, 8)
    images, labels = collect(data.test_batches(3, CPU))
    assert images.shape == (8, 3, 8, 8)
    assert labels.tolist() == [0] * 4 + [1] * 4
    once, again = (collect(data.train_batches(Feed(4, 1, CPU), 2))[0] for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_fingerprint_is_of_the_content(in_memory, tmp_path):
    settings = spec("folder", num_classes=2, in_memory=in_memory)
    here, there = (write_images(tmp_path / name) for name in ("here", "there"))
    assert load_data(settings, here).fingerprint == load_data(settings, there).fingerprint
    Image.new("RGB", (8, 8)).save(there / "train" / "a" / ("0.png" if in_memory else "new.png"))
    load_data.__globals__["_load"].cache_clear()
    assert load_data(settings, here).fingerprint != load_data(settings, there).fingerprint


def test_grey_images_for_a_colour_network():
    data = load_data(spec("digits", channels=3))
    images, _ = next(iter(data.test_batches(4, CPU)))
    assert images.shape == (4, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])


def test_idx(tmp_path):
    data = load_data(spec("idx", channels=1, options={"torchvision": "MNIST"}), write_idx(tmp_path))
    assert (data.train_size, data.test_size) == (20, 20)


def test_fashion_mnist(fashion_mnist):
    data = load_data(spec("idx", channels=1, options={"torchvision": "FashionMNIST"}), fashion_mnist)
    assert (data.train_size, data.test_size) == (60000, 10000)
    _, labels = collect(data.test_batches(1000, CPU))
    assert labels.bincount().tolist() == [1000] * 10


def test_wrong_folders(tmp_path):
    folder = spec("folder", num_classes=None)
    with pytest.raises(DataError, match="needs data_dir"):
        load_data(folder)
    with pytest.raises(DataError, match="there is no such folder"):
        load_data(folder, tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected folders train/ and val/"):
        load_data(folder, tmp_path)
    write_images(tmp_path)
    with pytest.raises(DataError, match="num_classes=10, but .* has 2 class folders"):
        load_data(spec("folder"), tmp_path)
    (tmp_path / "test" / "c").mkdir()
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(DataError, match="has no images"):
        load_data(folder, tmp_path)
    (tmp_path / "train" / "c").rmdir()
    (tmp_path / "test" / "c").rmdir()
    write_images(tmp_path, classes=("d",), splits=("test",))
    with pytest.raises(DataError, match=r"differ in the classes \['d'\]"):
        load_data(folder, tmp_path)


def test_streamed_augmentation_does_not_depend_on_the_workers(tmp_path):
    root = write_images(tmp_path, size=12)
    batches = [
        collect(
            load_data(spec("folder", num_classes=2, in_memory=False, flip=True, workers=w), root).train_batches(
                Feed(4, 1, CPU), 2
            )
        )
        for w in (0, 2)
    ]
    assert torch.equal(batches[0][0], batches[1][0])


@pytest.mark.parametrize("content", [b"", b"\x89PNG broken"])
def test_empty_and_corrupt_images_are_named(content, tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "b" / "2.png").write_bytes(content)
    with pytest.raises(DataError, match=r"train/b/2\.png is not a readable image"):
        load_data(spec("folder", num_classes=2), tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_streamed_image_is_named_in_one_line(workers, tmp_path):
    write_images(tmp_path)
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"")
    data = load_data(spec("folder", num_classes=2, in_memory=False, workers=workers), tmp_path)
    with pytest.raises(DataError) as caught:
        collect(data.test_batches(4, CPU))
    assert str(caught.value).count("\n") == 0
    assert "test/a/1.png is not a readable image" in str(caught.value)


def test_damaged_idx(tmp_path):
    settings = spec("idx", channels=1, options={"torchvision": "MNIST"})
    path = write_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        load_data(settings, tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-7]))
    with pytest.raises(DataError, match="not a whole idx file"):
        load_data(settings, tmp_path)


def test_labels_out_of_range(tmp_path):
    with pytest.raises(DataError, match="label is 11"):
        load_data(spec("idx", channels=1, options={"torchvision": "MNIST"}), write_idx(tmp_path, 3, [1, 2, 11]))
