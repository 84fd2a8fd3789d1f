"""Writes `result.json` and `model.safetensors`, the results of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tspc.compression import checkpoint
from tspc.compression.integers import state_bytes
from tspc.compression.plan import Plan
from tspc.models import NetworkSpec
from tspc.pages import made, write_report
from tspc.phases.finished import unfinished
from tspc.phases.table import FIRST
from tspc.run.config import Config
from tspc.run.contract import contract_in, contract_of, tell
from tspc.run.deliveries import Deliveries
from tspc.run.job import Job
from tspc.run.networks import Networks
from tspc.store.files import intact, write_json
from tspc.store.schemas import RESULT
from tspc.terminal.tables import result_lines, result_table, versions
from tspc.traversal.copying import copied


def result_of(
    config: Config,
    spec: NetworkSpec,
    directory: Path,
    finished: dict[str, dict[str, Any]],
    reference: dict[str, Any],
    sizes: dict[str, int],
) -> dict[str, Any]:
    """The content of `result.json`, as plain data, without what export and benchmark found.

    `finished` has the records of the phases, in order. `sizes` are the bytes before, after, and in the file.
    """
    plan = Plan.from_dict(finished[FIRST]["plan"])
    return {
        "directory": str(directory),
        **config.planning.identity,
        "rate": plan.rate,
        "rate_unit": plan.rate_unit,
        "rate_scope": plan.rate_scope,
        "rate_reached": plan.rate_reached,
        "paths": plan.paths,
        "output_error": plan.output_error,
        "dataset": config.dataset.name,
        "network": spec.name,
        "seed": config.seed,
        "reference": reference,
        "phases": {k: {"accuracy": v["accuracy"], "seconds": v["seconds"]} for k, v in finished.items()},
        "accuracy": finished[next(reversed(finished))]["accuracy"],
        "parameters": {
            "before": plan.network_dense_params,
            "after": plan.network_params,
            "tensorized_before": plan.dense_params,
            "tensorized_after": plan.params,
        },
        "bytes": sizes,
        "versions": versions(),
        "command": config.command,
        "settings": config.settings,
    }


def made_with(path: Path, phases: dict[str, Any]) -> dict[str, Any]:
    """What the result in `path` says of the command that made this network; empty if it is about another network.

    So the result keeps this command if a later one only exports or measures.
    """
    before = intact(path, RESULT) or {}
    seconds = [
        [(name, phase["seconds"]) for name, phase in found.items()] for found in (before.get("phases", {}), phases)
    ]
    same = seconds[0] == seconds[1]
    return {key: before[key] for key in ("command", "settings", "device", "versions") if same and key in before}


def finish(job: Job, networks: Networks, reference: dict[str, Any]) -> dict[str, Any]:
    """Writes `model.safetensors` and `result.json`, exports and measures if asked for, and makes the report.

    All of this is about the last network. `reference` is the result's part on the reference.
    """
    last, directory, display = networks.last.name, job.directory, job.context.display
    target, path = directory.file("model.safetensors"), directory.file("result.json")
    model = networks.read_last(copied(job.reference).cpu())
    checkpoint.save(model, target, network=job.network, info={"stage": last, "identity": directory.identity})
    sizes = {"before": job.bytes_before, "after": state_bytes(model), "file": target.stat().st_size}
    result = result_of(job.config, job.network, directory.path, networks.finished, reference, sizes)
    result["device"] = str(job.context.device)
    result |= made_with(path, result["phases"])
    known = None if job.config.overwrite else contract_in(intact(path, RESULT), networks.fingerprint)
    plan = Plan.from_dict(networks.finished[FIRST]["plan"])
    deliveries = Deliveries(job, networks.fingerprint)
    write_json(path, result | deliveries.found())  # first of all: what follows may fail
    result["contract"] = known or contract_of(job, model, result, plan, networks.fingerprint)
    write_json(path, result | deliveries.found())
    display.show(result_table(result, job.config.task.inputs))
    for line in result_lines(result, target):
        display.line(line)
    tell(result["contract"], display)
    if stopped := unfinished(directory.path):
        display.warn(f"{stopped} was stopped before its end; this is the network after {last}")
    deliveries.make(model)
    deliveries.show()
    write_json(path, result := result | deliveries.found())
    if job.config.report:
        made(lambda: write_report(directory.path), display)
    return result
