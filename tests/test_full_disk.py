"""Disks that are full: named as such whoever writes, and nothing of the older file is lost."""

from __future__ import annotations

import resource
import signal
import tempfile
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from tspc.errors import RunError
from tspc.store.files import write_atomically
from tspc.traversal.stash import Room

BIG = torch.zeros(2**19)
WRITERS = {
    "torch": lambda path: torch.save({"a": BIG}, path),
    "torch, older format": lambda path: torch.save({"a": BIG}, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file({"a": BIG}, path),
    "bytes": lambda path: path.write_bytes(bytes(2**21)),
}


@contextmanager
def largest_file(size):
    """Within it the system refuses to write files beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_the_system_refuses_is_named_whoever_writes(writer, tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("old")
    with largest_file(2**20), pytest.raises(RunError, match=r"cannot write .*a\.pt: File too large$"):
        write_atomically(path, WRITERS[writer])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_behind_an_error_that_does_not_say_so(tmp_path):
    """The temporary file is a device that is always full, as a disk is."""

    def write(temporary):
        temporary.symlink_to("/dev/full")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with pytest.raises(RunError, match=r"No space left on device; free some space and run the same command again"):
        write_atomically(tmp_path / "a.pt", write)
    assert not list(tmp_path.iterdir())


def test_other_errors_keep_their_own_words(tmp_path):
    def write(temporary):
        raise RuntimeError("cannot pickle\nmore")

    with pytest.raises(RunError, match=r"a\.pt: cannot pickle$"):
        write_atomically(tmp_path / "a.pt", write)


def test_activations_that_find_no_space(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = Room(0)
    with largest_file(2**20), pytest.raises(RunError, match=r"cannot keep activations in .*: File too large; free"):
        room.write([BIG])
    room.close()
    assert not list(tmp_path.iterdir())


def test_no_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="cannot make a folder for temporary files: No such file .* TMPDIR"):
        Room(0)
