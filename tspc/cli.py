"""The `tspc` command. The only file that knows Hydra; PyTorch is imported when a job starts, not before."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tspc.errors import TspcError
from tspc.sweep import write_record

FAILED, INTERRUPTED = 1, 130


def _config_path() -> str:
    """`conf/` inside the wheel, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return str(next(p for p in (here / "conf", here.parent / "conf") if p.is_dir()))


def _job(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode == hydra.types.RunMode.MULTIRUN
    overrides = list(hydra_config.overrides.task)
    try:
        result = _run(config, f"job {hydra_config.job.num}: {' '.join(overrides)}" if is_sweep else None)
        error = None
    except Exception as exception:
        if not is_sweep:
            raise
        # The other jobs of a sweep go on; the table at its end tells which failed, and why.
        result, error = None, _describe(exception)
        print(f"tspc: {error}", file=sys.stderr)
    if is_sweep:
        write_record(Path(hydra_config.sweep.dir), int(hydra_config.job.num), overrides, result, error)


def _run(config: DictConfig, heading: str | None) -> dict[str, Any]:
    from tspc.config import read_config
    from tspc.display import Display
    from tspc.pipeline import run

    display = Display()
    if heading is not None:
        display.heading(heading)
    try:
        return run(read_config(config), display)
    except TspcError:
        raise
    except Exception:
        logging.getLogger("tspc").exception("unexpected error")
        raise


def _describe(error: BaseException) -> str:
    """One readable line: ours as it is, Hydra's folded, anything else with its type."""
    if isinstance(error, TspcError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        parts = (line.strip() for line in str(error).splitlines())
        return " ".join(part for part in parts if part and not part.startswith("Set the environment variable"))
    return f"unexpected {type(error).__name__}: {error}"


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a mistake or a failed job (one line on stderr), 130 interrupted."""
    # With this set, Hydra raises its errors instead of printing them: all errors are then printed in one way.
    debugging = os.environ.setdefault("HYDRA_FULL_ERROR", "1") == "1" and "TSPC_DEBUG" in os.environ
    try:
        hydra.main(version_base="1.3", config_path=_config_path(), config_name="config")(_job)()
    except KeyboardInterrupt:
        print("tspc: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (TspcError, HydraException, OmegaConfBaseException) as error:
        if debugging:
            raise
        print(f"tspc: {_describe(error)}", file=sys.stderr)
        sys.exit(FAILED)
