"""Runs the command in a process that is killed before or after a seeded call that changes the disk.

`python -m tests.killing CALLS POINT COMMAND…` runs the command and is killed at its POINT-th such call, or runs to its
end where POINT is negative, and then writes to the file CALLS how many there were.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forking import Forks

CALLS = ("replace", "rename", "unlink", "fsync", "open")


class Killer:
    """Counts the moments before and after each call; at `point` the process dies."""

    def __init__(self, point: int) -> None:
        self.point, self.passed = point, 0

    def _passes(self) -> None:
        if self.passed == self.point:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    def watch(self, name: str) -> None:
        call: Callable[..., Any] = getattr(os, name)

        def watched(*args: Any, **named: Any) -> Any:
            if name == "open" and not (len(args) > 1 and args[1] & (os.O_CREAT | os.O_WRONLY)):
                return call(*args, **named)
            self._passes()
            result = call(*args, **named)
            self._passes()
            return result

        setattr(os, name, watched)


def survives(top: Path, command: tuple[str, ...], run: Path, directories: int, forks: Forks, kills: int = 3) -> None:
    """Asserts that a killed command, given again, ends with the weights of an undisturbed run in the folder `run`.

    In each of the `directories` it is killed up to `kills` times before it may run to its end.
    """
    from safetensors.torch import load_file

    said: dict[str, str] = defaultdict(str)

    def once(name: str, point: int) -> int:
        (top / name).mkdir(exist_ok=True)
        calls = top / f"{name}.calls"
        process = forks.start("-m", "tests.killing", str(calls), str(point), *command, folder=top / name)
        said[name] += "".join(process.communicate())
        return process.wait()

    assert once("whole", -1) == 0, said["whole"]
    calls = int((top / "whole.calls").read_text())
    assert calls > 100
    expected = load_file(top / "whole" / run / "model.safetensors")
    for seed in range(directories):
        points = random.Random(seed)
        name, killed = f"killed{seed}", 0
        for _ in range(kills):
            status = once(name, points.randrange(calls))
            killed += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), said[name]
        assert killed, "killed too late to show anything"
        assert once(name, -1) == 0, said[name]
        found = load_file(top / name / run / "model.safetensors")
        assert all(expected[key].equal(found[key]) for key in expected), f"{name}: other weights"
        assert left_over(top / name) == [], name
        assert said[name].count("Traceback") == 0


def left_over(folder: Path) -> list[str]:
    """What a run that was stopped leaves, and a finished one does not."""
    return [str(path) for path in folder.rglob("*") if any(word in path.name for word in ("progress", "partial"))]


def main(calls: str, point: str, *command: str) -> None:
    killer = Killer(int(point))
    for name in CALLS:
        killer.watch(name)
    from tspc.cli import main

    sys.argv = ["tspc", *command]
    try:
        main()
    finally:
        killer.point = -1
        Path(calls).write_text(str(killer.passed))


if __name__ == "__main__":
    main(*sys.argv[1:])
