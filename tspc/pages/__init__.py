"""Pages made from the files of runs: `report.html` of one run, `sweep.html` of many.

Everything on a page comes from the runs' directories, so a page can be made again anywhere.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from tspc.errors import TspcError
from tspc.pages.compare import write_comparison, write_sweep
from tspc.pages.frontier import write_frontier
from tspc.pages.report import write_report
from tspc.terminal.display import Display

__all__ = ["made", "write_comparison", "write_frontier", "write_report", "write_sweep"]

logger = logging.getLogger("tspc")


def made(make: Callable[[], Path], display: Display) -> Path | None:
    """Makes a page and prints its path. If that fails, a warning says so, and the run goes on."""
    try:
        page = make()
    except Exception as error:
        if not isinstance(error, TspcError):
            logger.exception("page not made")
        display.warn(f"page       not made: {error}")
        return None
    display.line(f"page       {os.path.relpath(page)}")
    return page
