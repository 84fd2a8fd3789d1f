"""The settings of a run that belong to no group: top-level keys of `conf/config.yaml`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tspc.run.trackers import TRACKERS
from tspc.store.scores import TOP1
from tspc.system.bounds import COUNT, NONE_OR_MORE, SEEDS, out_of_range, shown
from tspc.terminal.display import VERBOSITIES
from tspc.training import name_problem

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
LONGEST_NAME = 100
"""The largest number of characters in a name that becomes a folder's name."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run reads and writes, on which device, and what it shows; `conf/config.yaml` explains each key."""

    data_dir: Path | None = None
    pretrained: str | None = None
    output_dir: Path = Path("outputs")
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    variant: str | None = None
    metric: str = TOP1
    eval_samples: int | None = None
    checkpoint_seconds: float = 60.0
    precision: str = "auto"
    compile: bool = False
    tracker: str = "none"
    report: bool = True
    runs: str | None = None
    verbosity: str = "normal"

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        texts = {key: getattr(self, key) for key in ("pretrained", "device", "variant", "runs")}
        found = [
            f"{key}={text!r} is empty; leave it out"
            for key, text in texts.items()
            if text is not None and not text.strip()
        ]
        if self.variant and (not re.fullmatch(r"[\w.,=+-]+", self.variant) or len(self.variant) > LONGEST_NAME):
            found.append(
                f"variant={shown(self.variant)}: expected letters, digits and . , = + - _ only, {LONGEST_NAME} at most"
            )
        found += filter(None, [name_problem(self.metric)])
        allowed = {
            "seed": SEEDS,
            "eval_samples": COUNT,
            "checkpoint_seconds": NONE_OR_MORE,
            "precision": PRECISIONS,
            "tracker": TRACKERS,
            "verbosity": VERBOSITIES,
        }
        return found + out_of_range(self, where, allowed)
