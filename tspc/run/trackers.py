"""Sends the numbers that go into `metrics.jsonl` to an experiment tracker, through accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from tspc.errors import ConfigError
from tspc.store.records import flattened

TRACKERS = ("none", "tensorboard", "wandb", "mlflow")

Note = Callable[[dict[str, Any]], None]


@contextmanager
def tracked(
    tracker: str, folder: Path, settings: dict[str, Any], note: Note, cpu: bool, start: int = 0
) -> Iterator[Note]:
    """`note`, but it also sends the record to the tracker. The records are numbered from `start`.

    Raises ConfigError if the tracker's package is not installed.
    """
    if tracker == "none":
        yield note
        return
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    if tracker not in [str(name) for name in get_available_trackers()]:
        raise ConfigError([f"tracker={tracker}: its package is not installed; pip install 'tspc[{tracker}]'"])
    accelerator = Accelerator(cpu=cpu, log_with=tracker, project_dir=str(folder))
    known = {key: v if isinstance(v, int | float | str) else str(v) for key, v in flattened(settings).items()}
    accelerator.init_trackers("tspc", known)
    numbers = count(start)

    def both(record: dict[str, Any]) -> None:
        note(record)
        accelerator.log(measurements(record), step=next(numbers))

    try:
        yield both
    finally:
        accelerator.end_training()


def measurements(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, named `<phase>/[<block or layer>/]<what>`."""
    where = "/".join(str(record[key]) for key in ("phase", "block", "layer") if key in record)
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"{where}/{key}": float(value) for key, value in numbers.items()}
