"""Processes of Python that begin as forks of one that has imported tspc already, which takes seconds.

All of them have the same seed of hashes; where that may matter, a test starts a process of its own.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Fork:
    """A process that runs; what it prints is in the files `out` and `err`."""

    def __init__(self, owner: Forks, pid: int, out: Path, err: Path) -> None:
        self._owner, self.pid, self._out, self._err = owner, pid, out, err
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._owner.ask(do="poll", pid=self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"it still runs after {timeout} seconds")
            time.sleep(0.01)
        return code

    def send_signal(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Waits for the end: what was printed, on stdout and on stderr."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()


class Forks:
    """Starts them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forking"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def load(self, module: str) -> None:
        """Imports another module, so that each process need not."""
        self.ask(do="load", module=module)

    def start(self, *arguments: str, folder: Path, **environment: str) -> Fork:
        """As `python ARGUMENTS` in the folder; they begin with `-c` or `-m`."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        given = {"arguments": arguments, "folder": str(folder), "environment": environment}
        return Fork(self, self.ask(do="start", out=str(out), err=str(err), **given), out, err)

    def close(self) -> None:
        self._process.communicate()


def serve() -> dict[str, Any] | None:
    """Answers requests until there are no more; a new process leaves with its own request."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if request["do"] == "load":
            importlib.import_module(request["module"])
        elif request["do"] == "start":
            answer = os.fork()
            if not answer:
                return request
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def become(request: dict[str, Any]) -> None:
    """Runs what was asked for in this process."""
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.path.insert(0, request["folder"])
    how, what, *arguments = request["arguments"]
    sys.argv = [how, *arguments]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def main() -> None:
    import torch

    used_later = ("matplotlib.figure", "scipy.stats", "sklearn.datasets", "torch._dynamo", "torchvision.transforms.v2")
    for module in (*used_later, "tests.small", "tspc.cli", "tspc.run.pipeline"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays, and the new processes share its memory
    request, code = serve(), 0
    if request is not None:
        try:
            become(request)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter would take another second to tidy up


if __name__ == "__main__":
    main()
