"""The `tspc` command. It starts Hydra; PyTorch is imported when a job starts, not before."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tspc import __version__
from tspc.compression.goal_names import KINDS
from tspc.errors import ConfigError, DataError, Interrupted, RunError, TrainingError, TspcError
from tspc.run.sweep import forget_empty_sweep, sweep_folder, write_record
from tspc.system.bounds import shown
from tspc.system.launch import count, is_first

FAILED, INTERRUPTED = 1, 130
GROUPS = ("method", "dataset", "model", "task")
"""Groups from which one option is chosen; of phases there may be several."""
LONGEST_LINE = 600
"""Characters of a complaint of Hydra's."""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a mistake or a failed job (a line on stderr), 128 + n stopped by signal n."""
    if sys.argv[1:] == ["--version"]:
        print(f"tspc {__version__}")
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode gets a question mark, not a traceback
            stream.reconfigure(errors="replace")
    # Hydra would print its errors in a form of its own; with this set it raises them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[0] = "tspc"  # what argparse's own messages begin with, also for `python -m tspc`
    # Hydra wants the sweep's flag before the settings; people write it anywhere.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    failures: list[str] = []
    try:
        _check_arguments(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=_config_path(), config_name="config")(_job(failures))()
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted; the same command goes on where it stopped")
        sys.exit(128 + stop.signal if isinstance(stop, Interrupted) else INTERRUPTED)
    except Exception as error:  # of the arguments or the files of settings: a job keeps its errors to itself
        GlobalHydra.instance().clear()
        forget_empty_sweep()
        failures.append(_plain_error(error))
        _complain(failures[-1])
    if failures:
        sys.exit(FAILED)


def _complain(message: str, error: Exception | None = None) -> None:
    """Prints a line to stderr. The first process prints for all; another one prints only errors of its own."""
    if is_first():
        print(f"tspc: {message}", file=sys.stderr)
    elif isinstance(error, DataError | TrainingError):
        print(f"tspc: process {os.environ.get('RANK')}: {message}", file=sys.stderr)


def _config_path() -> str:
    """`conf/` inside the wheel, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return str(next(p for p in (here / "conf", here.parent / "conf") if p.is_dir()))


def _job(failures: list[str]) -> Any:
    """The function that Hydra calls for each job; it catches errors, so that a sweep's other jobs go on."""

    def job(config: DictConfig) -> None:
        settings = HydraConfig.get()
        is_sweep = settings.mode == RunMode.MULTIRUN
        overrides = _overrides()
        result, error = None, None
        try:
            result = _run(config, f"job {settings.job.num}: {' '.join(overrides)}" if is_sweep else None)
        except Exception as exception:
            error = _describe(exception)
            failures.append(error)
            _complain(error, exception)
        if is_sweep and is_first():
            write_record(sweep_folder(settings.sweep.dir), int(settings.job.num), overrides, result, error)

    return job


def _run(config: DictConfig, heading: str | None) -> dict[str, Any]:
    _require_temporary_files()  # importing PyTorch may need them already
    from tspc.run.config import read_config
    from tspc.run.pipeline import run
    from tspc.system import interrupts
    from tspc.terminal.display import Display, shown_warnings

    _refuse_lists_of_options(config)
    settings = dataclasses.replace(read_config(config, _given()), command=_command())
    display = Display(is_silent=not is_first(), verbosity=settings.verbosity)
    if heading is not None:
        display.heading(heading)
    with interrupts.handled(), shown_warnings(display):
        return run(settings, display)


def _require_temporary_files() -> None:
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise RunError("cannot write temporary files: free some space, or name another folder by TMPDIR") from error


def _check_arguments(arguments: list[str]) -> None:
    """Raises ConfigError for mistakes that only the command line shows, and for two goals of one kind."""
    given = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument)
    if "" in given:
        raise ConfigError([f"={shown(given[''])} names no setting; write KEY=VALUE, as in rate=0.1"])
    for kind in KINDS:
        goals = [f"{key}={given[key]}" for key in kind if given.get(key, "null") != "null"]
        if len(goals) > 1:
            raise ConfigError([f"{' and '.join(goals)} are two goals; leave one of them out"])


def _overrides() -> list[str]:
    """The overrides of this job, as they were typed."""
    return cast("list[str]", OmegaConf.to_container(HydraConfig.get().overrides.task))


def _given() -> list[str]:
    """The keys that the command line sets."""
    return [override.lstrip("+").split("=", 1)[0] for override in _overrides() if "=" in override]


def _refuse_lists_of_options(config: DictConfig) -> None:
    """Raises ConfigError if several options of a group were given: Hydra would take the last one, or none."""
    settings = HydraConfig.get()
    lists = [override for override in _overrides() if re.match(rf"\+*({'|'.join(GROUPS)})(@\w*)?=\[", override)]
    # Hydra notes the option chosen of each group in the list of defaults, if it is one.
    merged = [f"{g}=[…]" for g in GROUPS if g in config and g not in settings.runtime.choices]
    if lists or (merged and settings.job.config_name == "config"):
        what = ", ".join(map(shown, lists or merged))
        raise ConfigError([f"{what}: choose one option; to run several, one after the other: tspc -m KEY=A,B"])


def _command() -> str:
    """The command that makes this run again; for a job of a sweep, only this job."""
    settings = HydraConfig.get()
    folders = [s.path for s in settings.runtime.config_sources if s.provider == "command-line"]
    parts = [*(part for folder in folders for part in ("--config-dir", folder)), *_overrides()]
    return shlex.join(["tspc", *parts])


def _describe(error: Exception) -> str:
    """One line for a mistake of the user; other errors are faults of tspc, and their traceback is shown."""
    if isinstance(error, TspcError):
        return " ".join(str(error).split())
    if count() > 1 and "onnection" in str(error):
        return "lost another process; if it left a line, that says why"
    if is_first():
        traceback.print_exception(error)
    return f"unexpected {type(error).__name__}: {error}"


def _plain_error(error: Exception) -> str:
    """An error of Hydra, the YAML parser or the system in one line: what is wrong, and what would be right."""
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        # Hydra makes a sweep's directory itself.
        return f"cannot write {error.filename}: {error.strerror}; choose another output_dir"
    message = str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if "Config group override must be" in message:
        groups = "|".join((*GROUPS, "phase", r"hydra/\w+"))
        # Letters are a name, and in brackets there is a list of names.
        wrong = [a for a in sys.argv[1:] if re.match(rf"\+*({groups})(@\w*)?=(null|true|false|[^a-z\[]|$)", a, re.I)]
        return f"{shown(', '.join(wrong))}: each names one of the files in conf/, as method=cp does; see tspc --help"
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", message)
    if unknown:
        return _unknown_key(unknown.group(1) or unknown.group(2))
    option = re.search(r"Could not (?:find|load) '((?:hydra/)?\w+)/([^']+)'", message)
    if option:
        group, name = option.groups()
        known = sorted(path.stem for path in Path(_config_path(), group).glob("*.yaml"))
        return f"{group}={name} does not exist; choose one of {', '.join(known)} (or your own: --config-dir)"
    lines = [line.strip() for line in message.split("Config search path:")[0].splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("Set the environment variable"))
    key = getattr(error, "full_key", None)
    text = f"{key}: {text}" if key and str(key) not in text else text
    if not isinstance(error, HydraException | OmegaConfBaseException | YAMLError | TspcError):
        text = f"the settings cannot be read ({type(error).__name__}: {text})"
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}…"


def _unreadable(error: OverrideParseException) -> str:
    """The message for an argument that Hydra cannot parse, with the right quotes: = , ( ) [ ] { } : have a meaning."""
    key, equals, value = error.override.partition("=")
    if not equals:
        return f"{shown(error.override)}: expected KEY=VALUE, as in rate=0.1"
    inside = value.strip("'\"").replace("\\", "\\\\").replace("'", "\\'")
    quoted = f"{key}='{inside}'"
    # In double quotes where the shell leaves what is in them alone: easier to read.
    remedy = shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'
    return f"{shown(error.override)} cannot be read; a value with such signs in it needs quotes of its own: {remedy}"


def _unknown_key(key: str) -> str:
    """The message for a key that does not exist, with the keys of its group."""
    parent, dot, name = key.rpartition(".")
    # Composed with the groups that were chosen, for each method and each phase has keys of its own.
    chosen = [
        re.sub(r",[^\]]*$", "", a) for a in sys.argv[1:] if re.match(r"(method|dataset|model|task|phase)=[\w[]", a)
    ]
    with hydra.initialize_config_dir(_config_path(), version_base="1.3"):
        try:
            node: Any = hydra.compose("config", chosen)
        except Exception:  # what is wrong with these too is told when this is mended
            node = hydra.compose("config")
    if parent.startswith("phase.") and parent.split(".")[1] not in node.phase:
        return f"{key} has no effect: the phases asked for are {', '.join(node.phase)}; leave it out"
    if name in ("kwargs", "options") or parent.endswith(("kwargs", "options")):
        return f"{key} has no such entry yet; a new one is added with +, as in +model.kwargs.NAME=VALUE"
    ends = f".{key.removeprefix('phases.')}"
    hint = " or ".join(path for path in _paths(node) if path.endswith(ends))
    while parent and not isinstance(OmegaConf.select(node, parent), DictConfig):
        parent, dot, name = parent.rpartition(".")
    known = list(OmegaConf.select(node, parent) if parent else node)
    near = difflib.get_close_matches(name, known, n=1)
    hint = hint or (f"{parent}{dot}{near[0]}" if near else "")
    return f"{key} is not a setting; {f'did you mean {hint}? ' if hint else ''}known here: {', '.join(known)}"


def _paths(node: DictConfig, start: str = "") -> Iterator[str]:
    """The full names of all settings."""
    for name in map(str, node):
        below = node._get_node(name)
        yield from _paths(below, f"{start}{name}.") if isinstance(below, DictConfig) else [f"{start}{name}"]
