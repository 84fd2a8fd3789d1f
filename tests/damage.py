"""Damage as disks, kills and hands do it to the files of a run, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

DEEP: Any = None
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 5, 10**30, 10**400, -1e308, 1e308, float("nan"), float("inf"), 0.5),
    *("", "=1+1", "\ud800", "a" * 10_000, [], {}, [None], {"a": 1}, DEEP),
)
BYTES = (b"", b"null\n", b"5\n", b"[]", b"{}", b'{"half', b"\xff\xfe\x00\x9f" * 30, b"[" * 100_000, b"9" * 10_000)


def damage(folder: Path, chance: random.Random) -> str:
    """Damages one to three files below `folder`; returns what was done, in words."""
    done = []
    for _ in range(chance.randint(1, 3)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = chance.choice(files)
        how = chance.choice([_replace, _cut, _delete, _make_folder, _change, _change, _change])
        done.append(f"{how.__name__} {path.relative_to(folder)}: {how(path, chance)}")
    return "; ".join(done)


def _replace(path: Path, chance: random.Random) -> str:
    content = chance.choice(BYTES)
    path.write_bytes(content)
    return repr(content[:20])


def _cut(path: Path, chance: random.Random) -> int:
    size = chance.randrange(path.stat().st_size + 1)
    path.write_bytes(path.read_bytes()[:size])
    return size


def _delete(path: Path, chance: random.Random) -> str:
    path.unlink()
    return ""


def _make_folder(path: Path, chance: random.Random) -> str:
    path.unlink()
    path.mkdir()
    (path / "in the way").write_text("")
    return ""


def _change(path: Path, chance: random.Random) -> str:
    """One value of what the file says, or a key less; of a file that says nothing, one bit."""
    with suppress(ValueError, TypeError, SafetensorError):
        if path.suffix == ".json":
            data = json.loads(path.read_bytes())
            done = change(data, chance)
            path.write_text(json.dumps(data))
            return done
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in path.read_bytes().splitlines()]
            done = change(records, chance)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            return done
        if path.suffix == ".safetensors":
            return _change_header(path, chance)
    content = bytearray(path.read_bytes() or b"\0")
    place = chance.randrange(len(content))
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"bit of byte {place}"


def _change_header(path: Path, chance: random.Random) -> str:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["tspc"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    done = change(header["info"], chance)
    safetensors.torch.save_file(state, path, {"tspc": json.dumps(header)})
    return done


def change(data: Any, chance: random.Random) -> str:
    """Changes or removes one value anywhere in plain data, in place."""
    places = list(_places(data, ""))
    if not places:
        return "nothing"
    node, key, where = chance.choice(places)
    if chance.random() < 0.25:
        del node[key]
        return f"without {where}"
    node[key] = chance.choice(VALUES)
    return f"{where} = {str(repr(node[key]) if node[key] != 10**400 else '10**400')[:40]}"


def _places(node: Any, where: str) -> Iterator[tuple[Any, Any, str]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key, f"{where}/{key}"
        yield from _places(node[key], f"{where}/{key}")
