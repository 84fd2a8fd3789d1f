"""Pictures of real output for the README: the terminal half-way through a run, a report, and a sweep's page.

    python -m benchmarks.gallery --out docs

It compresses a network of the digits (nothing to download) by every method at four rates, in about five minutes, and
photographs the pages in headless Chromium. `--runs FOLDER` shows the comparison of other runs instead of that sweep.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import re
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console, RenderableType

from tspc.pages import write_comparison
from tspc.run.config import read_config
from tspc.run.pipeline import run
from tspc.terminal.display import Bar, Display

CONF = Path(__file__).parent.parent / "conf"
METHODS, RATES = ("svd", "cp", "tk", "tt", "rcp", "rtk", "rtt"), ("0.4", "0.2", "0.1", "0.05")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"


class Photographed(Display):
    """Keeps what a terminal of 100 columns shows when finetuning is two thirds done."""

    def __init__(self) -> None:
        super().__init__(Console(force_terminal=True, width=100))
        self.paper = Console(record=True, width=100, force_terminal=True, file=io.StringIO())
        self._is_taken = False

    def show(self, renderable: RenderableType, logged: RenderableType | None = None) -> None:
        super().show(renderable, logged)
        if not self._is_taken:
            self.paper.print(renderable)

    def bar(self, label: str, total: int) -> Bar:
        made = super().bar(label, total)
        advance = made.advance

        def advanced(done: int, note: str = "", loss: float | None = None) -> None:
            advance(done, note, loss)
            if label.startswith("finetune") and done >= total * 2 / 3 and not self._is_taken:
                assert self._checklist is not None
                self.paper.print(self._checklist)
                self._is_taken = True

        made.advance = advanced  # type: ignore[method-assign]
        return made

    def svg(self) -> str:
        """The picture, without the fonts that it would fetch."""
        return re.sub(r"@font-face\s*{[^}]*}", "", self.paper.export_svg(title="tspc", clear=False))


def compressed(folder: str, method: str, rate: str, display: Display) -> Path:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        settings = [f"method={method}", f"rate={rate}", f"output_dir={folder}"]
        result = run(read_config(compose("config", settings)), display)
    return Path(result["directory"])


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """The top of a page in headless Chromium, at twice the resolution."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options: Any = Options()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS.split(), f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1.5, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.resolve().as_uri())
        data = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    finally:
        driver.quit()
    picture.write_bytes(base64.b64decode(data))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("docs"))
    options.add_argument("--runs", help="a wildcard over runs to compare, instead of the sweep over the digits")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        display = Photographed()
        report = compressed(folder, "tt", "0.1", display) / "report.html"
        terminal = Path(folder, "terminal.svg")
        terminal.write_text(display.svg())
        width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', terminal.read_text())[0])
        photograph(terminal, given.out / "terminal.png", round(width), round(height))
        photograph(report, given.out / "report.png", 1180, 820)
        if given.runs is None:
            for method, rate in itertools.product(METHODS, RATES):
                compressed(folder, method, rate, Display(verbosity="quiet"))
        photograph(write_comparison(given.runs or folder), given.out / "sweep.png", 1180, 900)


if __name__ == "__main__":
    main()
