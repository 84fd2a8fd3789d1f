"""What the benchmarks on CIFAR-10 share: one run of the pipeline, and a line about the machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from tspc.data import Data, load_data
from tspc.run.config import Config, read_config
from tspc.run.pipeline import run
from tspc.run.reference import untrained_reference
from tspc.store.files import write_json
from tspc.terminal.display import Display
from tspc.terminal.tables import versions
from tspc.traversal.hooks import outputs_of

CONF = Path(__file__).parent.parent / "conf"


Row = tuple[str, str, str, Callable[[Any], dict[str, Any]]]


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", required=True, help="folder with train/ and test/ of class folders, 32×32 images")
    result.add_argument("--weights", required=True, help="the reference ResNet-32's weights")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--out", default="outputs/benchmark", help="runs are kept here, and not repeated")
    return result


def kept(folder: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` found; it is kept as `<name>.json` in the folder, and not made again."""
    path = folder / f"{name}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
        print(f"{name}: {json.loads(path.read_text())}", flush=True)
    return json.loads(path.read_text())


def kept_rows(
    options: argparse.Namespace, rows: Iterable[Row], bench_of: Callable[[argparse.Namespace], Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The name, the goal and the figures of each row, from --out or made now; with --report only those of --out.

    A row is the name of its file, its name, its goal, and what makes it from a bench, which is built when it is needed.
    """
    out, bench = Path(options.out), None
    for file, name, goal, make in rows:
        if not (out / f"{file}.json").exists():
            if options.report:
                continue
            bench = bench or bench_of(options)
        yield name, goal, kept(out, file, lambda make=make, bench=bench: make(bench))


def cifar_overrides(options: argparse.Namespace, folder: str | Path) -> list[str]:
    """What the command is given for runs from the pretrained ResNet-32, in this output directory."""
    return [
        "dataset=imagefolder",
        "dataset.name=cifar10_jpeg",
        "model=resnet32",
        f"data_dir={options.data}",
        f"pretrained={options.weights}",
        f"seed={options.seed}",
        f"output_dir={folder}",
    ]


def cifar_config(options: argparse.Namespace, *overrides: str) -> Config:
    """The settings of a run from the pretrained ResNet-32."""
    given = cifar_overrides(options, options.out)
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return read_config(compose("config", [*given, *overrides]))


def cifar_run(options: argparse.Namespace, *overrides: str) -> dict[str, Any]:
    """A run from the pretrained ResNet-32; returns its result."""
    return run(cifar_config(options, *overrides), Display())


def cifar_reference(options: argparse.Namespace) -> tuple[Config, Data, nn.Module]:
    """The settings of a run, its data and its reference network."""
    config = cifar_config(options)
    data = load_data(config.dataset, config.data_dir)
    spec = dataclasses.replace(config.network, num_classes=data.num_classes)
    return config, data, untrained_reference(config, spec, data).model


def calibration_images(data: Data, count: int, batch_size: int, device: torch.device) -> Tensor:
    """Unlabelled training images of a data set of images (count, C, H, W)."""
    return torch.cat([cast(Tensor, batch) for batch in data.calibration_batches(count, batch_size, device)])


@contextmanager
def tuned_block(model: nn.Module, reference: nn.Module, name: str) -> Iterator[Callable[[Tensor], None]]:
    """A step of the paper's code for one block: both whole networks forward, Adam at 1e-3, inference mode."""
    model.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.get_submodule(name).requires_grad_(True).parameters(), 1e-3)
    with outputs_of(model, [name]) as given, outputs_of(reference, [name]) as wanted:

        def step(images: Tensor) -> None:
            with torch.no_grad():
                reference(images)
            model(images)
            optimizer.zero_grad()
            F.mse_loss(given[name], wanted[name]).backward()
            optimizer.step()

        yield step


def machine(seed: int) -> str:
    """Processor or GPU, versions and seed, for the head of a table."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{name}, {os.cpu_count()} cores"
    return f"{device}; {', '.join(f'{k} {v}' for k, v in versions().items())}; seed {seed}."


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def top1(entry: dict[str, Any]) -> str:
    return f"{100 * entry['accuracy']['top1']:.2f}"
