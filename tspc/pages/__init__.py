"""Pages to look at, made from what a run left on disk: `report.html` of one run, `sweep.html` of many.

Everything on a page comes from the files in the runs' directories, so that a page can be made again anywhere.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from tspc.errors import TspcError
from tspc.pages.compare import write_comparison, write_sweep
from tspc.pages.report import write_report
from tspc.terminal.display import Display

__all__ = ["made", "write_comparison", "write_report", "write_sweep"]

logger = logging.getLogger("tspc")


def made(make: Callable[[], Path], display: Display) -> Path | None:
    """Makes a page and says where; a page that cannot be made costs a line, not the result that it is about."""
    try:
        page = make()
    except Exception as error:
        if not isinstance(error, TspcError):
            logger.exception("page not made")
        display.warn(f"page       not made: {error}")
        return None
    display.line(f"page       {os.path.relpath(page)}")
    return page
