"""Runs the command in forks of this process, each killed before or after a seeded call that changes the disk.

`python -m tests.killing FOLDER COMMAND…` reads lines `NAME POINT`: in the folder of that name the command is killed at
its POINT-th such call, or runs to its end where POINT is negative. Each is answered by a line: the exit status, and how
many calls there were.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("replace", "rename", "unlink", "fsync", "open")


class Killer:
    """Counts the moments before and after each call; at `point` the process dies."""

    def __init__(self, point: int, count: Path) -> None:
        self.point, self.count, self.passed = point, count, 0

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


def run(folder: Path, point: int, command: list[str]) -> int:
    """Forks; the child runs the command in the folder. Returns how it ended."""
    count = folder.parent / f"{folder.name}.calls"
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    killer = Killer(point, count)
    with (folder.parent / f"{folder.name}.out").open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(folder)
    for name in CALLS:
        killer.watch(name)
    from tspc.cli import main

    sys.argv = ["tspc", *command]
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = int(bool(stop.code))
    finally:
        killer.point = -1
        count.write_text(str(killer.passed))
        sys.stdout.flush()
        os._exit(status)
    return status


def survives(top: Path, command: tuple[str, ...], run: Path, directories: int, kills: int = 3) -> None:
    """Asserts that a killed command, given again, ends with the weights of an undisturbed run in the folder `run`.

    In each of the `directories` it is killed up to `kills` times before it may run to its end.
    """
    from safetensors.torch import load_file

    arguments = [sys.executable, "-m", "tests.killing", str(top), *command]
    root = Path(__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(top), str(root)])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, cwd=root, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]

        def once(name: str, point: int) -> list[int]:
            process.stdin.write(f"{name} {point}\n")
            process.stdin.flush()
            return [int(word) for word in process.stdout.readline().split()]

        status, calls = once("whole", -1)
        assert status == 0, (top / "whole.out").read_text()
        assert calls > 100
        expected = load_file(top / "whole" / run / "model.safetensors")
        for seed in range(directories):
            points = random.Random(seed)
            name, killed = f"killed{seed}", 0
            for _ in range(kills):
                status, _ = once(name, points.randrange(calls))
                killed += status == signal.SIGKILL
                assert status in (0, signal.SIGKILL), (top / f"{name}.out").read_text()
            assert killed, "killed too late to show anything"
            assert once(name, -1)[0] == 0, (top / f"{name}.out").read_text()
            found = load_file(top / name / run / "model.safetensors")
            assert all(expected[key].equal(found[key]) for key in expected), f"{name}: other weights"
            assert left_over(top / name) == [], name
            assert (top / f"{name}.out").read_text().count("Traceback") == 0
        process.stdin.close()


def left_over(folder: Path) -> list[str]:
    """What a run that was stopped leaves, and a finished one does not."""
    return [str(path) for path in folder.rglob("*") if any(word in path.name for word in ("progress", "partial"))]


def serve(top: Path, command: list[str]) -> None:
    import torch

    import tspc.run.pipeline  # noqa: F401  before the forks, so that each need not

    for argument in command:
        if argument.startswith("model.name=") and "model=transformers" in command:
            kind = argument.partition("=")[2]
            importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, point = line.split()
        (top / name).mkdir(exist_ok=True)
        status = run(top / name, int(point), command)
        calls = top / f"{name}.calls"
        sys.stdout.write(f"{status} {calls.read_text() if calls.exists() else -1}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2:])
