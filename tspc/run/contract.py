"""What a run was asked for, what it promised, and what was measured at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tspc.compression.goal_names import DROP
from tspc.compression.goals import goals_in, share_of
from tspc.compression.network_times import TOLERANCE, verify
from tspc.compression.plan import Plan
from tspc.compression.time_plans import shown as in_words
from tspc.data import ModelInputs
from tspc.data.arranging import as_positional
from tspc.phases.context import Context
from tspc.phases.inputs import example, tensors_of
from tspc.phases.judging import Pair
from tspc.phases.table import FIRST, NETWORK_PHASES
from tspc.run.config import Config
from tspc.run.folders import shared_folder
from tspc.run.job import Job
from tspc.store.files import intact, make_folder, write_json
from tspc.store.records import fingerprint
from tspc.store.schemas import DROPS
from tspc.store.scores import Scale, scale_in, value_in
from tspc.system.bounds import shown
from tspc.terminal.display import Display
from tspc.training import Drop


@dataclass(frozen=True)
class Goal:
    """A goal in words: as asked for, what the plan promised, what was measured. `kept` is None if it is unknown."""

    goal: str
    promised: str
    measured: str
    kept: bool | None

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def contract_of(job: Job, model: nn.Module, result: dict[str, Any], plan: Plan, state: str) -> dict[str, Any]:
    """The record of a run's goals. `state` is the fingerprint of the finished network `model`, on the CPU.

    `result` is the content of `result.json` so far. Only the first process calls this (`processes.by_first`).
    """
    settings = job.config.planning
    goals, found = [_of_size(job, result, plan)], {}
    if settings.max_drop is not None and job.judging is not None:
        found["drop"] = _drop(job, model, result, plan)
        goals.append(_of_drop(settings.max_drop, found["drop"], job.context.metric))
    if plan.promise is not None:
        found["time"] = _time(job, model)
        goals.append(_of_time(plan.promise, found["time"]))
    return {"state": state, "goals": [goal.to_dict() for goal in goals if goal is not None]} | found


def contract_in(result: dict[str, Any] | None, state: str) -> dict[str, Any] | None:
    """The contract in an earlier `result.json`, if it is about the same network."""
    found = (result or {}).get("contract")
    return found if found is not None and found["state"] == state else None


def tell(contract: dict[str, Any], display: Display) -> None:
    """A line for each goal, and a warning for each that was broken."""
    for goal in contract["goals"]:
        text = f"{goal['goal']}: promised {goal['promised']}; measured {goal['measured']}"
        if goal["kept"] is False:
            display.warn(f"contract   {text}: broken")
        else:
            display.line(f"contract   {text}{'' if goal['kept'] is None else ': kept'}")


def _of_size(job: Job, result: dict[str, Any], plan: Plan) -> Goal | None:
    settings = job.config.planning
    given, sizes = goals_in(settings), result["bytes"]
    measured = f"{sizes['after']:,} of {sizes['before']:,} bytes; {sizes['file']:,} in the file"
    if "size" in given:
        limit = share_of(given["size"], plan.network_dense_bytes) * plan.network_dense_bytes
        kept = sizes["after"] <= limit
        return Goal(f"size={given['size']}", f"{plan.network_bytes:,} bytes", measured, kept)
    if "target_error" in given:
        target, error = given["target_error"], plan.output_error
        kept = None if error is None else error <= target
        return Goal(f"target_error={target:g}", f"{target:g} at most, as expected", f"{error or 0:.4g}", kept)
    if not settings.decomposes:
        return Goal(f"bits={settings.bits}", f"{plan.network_bytes:,} bytes", measured, None)
    if "rate" in given or not given:
        of = "the network" if plan.rate_scope == "network" else "the layers"
        unit, counts = result["rate_unit"], result["parameters"]
        left = f"{result['rate_reached']:.4f} of the {unit} of {of}"
        measured = f"{left}; {counts['after']:,} of {counts['before']:,} parameters, {measured}"
        return Goal(f"rate={settings.ceiling:g}", left, measured, result["rate_reached"] <= settings.ceiling)
    return None


def _drop(job: Job, model: nn.Module, result: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The drop in points: what phase 0 promised, what held-out images say at the end, and what the test split says."""
    judged, judging = plan.judged or {}, job.judging
    assert judging is not None
    limit, level = judging.settings.max_drop or 0.0, 1 - judging.settings.terms.confidence
    before = (judged.get("drop") or {}).get("points")
    found = {"limit": limit, "confidence": 1 - level, "expected": before, "bound_promised": judged.get("bound")}
    if list(result["phases"]) == [FIRST] and judged.get("bound") is not None:  # it was tested when it was chosen
        final = {"points": before, "inputs": (judged.get("drop") or {}).get("inputs"), "bound": judged.get("bound")}
        final |= {"is_exact": judged.get("is_exact"), "kept": judged.get("passed")}
    else:
        is_trained = list(result["phases"]) != [FIRST]
        found["expected"] = judging.given_back(before) if is_trained and before is not None else before
        drop = judging.final(job.context.place(model), job.planning.sketch)
        if before is not None and is_trained and judged.get("passed") is None:
            remember_drops(job, (before, judging.after(model).value))
        final = _final(drop, limit, level)
        if judged.get("passed") is not None:  # the same images have tested networks in phase 0
            final["kept"] = None
    reference, last = result["reference"]["accuracy"], result["accuracy"]
    if reference is not None and last is not None:
        scale = scale_in(last)
        final |= {"test": scale.drop(value_in(reference), value_in(last)), "test_inputs": last["images"]}
    return found | final


def _time(job: Job, model: nn.Module) -> dict[str, Any]:
    """What `verify` finds: both networks are exported, and timed in turns in the runtime."""
    shape = job.planning.example
    if isinstance(shape, ModelInputs):
        inputs = as_positional(job.reference, shape)
    else:
        inputs = tensors_of(example(model, job.network, 1, job.context).tensors) if shape is None else shape
    return verify(job.reference, job.context.place(model), inputs, job.config.planning)


def _of_time(promise: dict[str, Any], found: dict[str, Any]) -> Goal:
    place = f"{promise['runtime']}, batch {promise['batch']}, {promise['threads']} threads"
    dense, small = found["dense"], found["compressed"]
    measured = (
        f"{in_words(small['median'])} at the median, {in_words(small['p95'])} at the 95th percentile; dense "
        f"{in_words(dense['median'])} and {in_words(dense['p95'])} in turns with it ({place})"
    )
    promised = f"{in_words(promise['seconds'])} (dense {in_words(promise['dense_seconds'])})"
    return Goal(promise["limit"], promised, measured + _drift(promise, found), found["kept"])


def _drift(promise: dict[str, Any], found: dict[str, Any]) -> str:
    """Says so if a time was promised on a machine that is slower now, for the network may not be to blame."""
    change = found["dense"]["median"] / promise["dense_seconds"] - 1
    if found["kept"] or change <= TOLERANCE or not promise["limit"].startswith("latency="):
        return ""
    return (
        f"; the dense network takes {100 * change:.0f} % more than at the promise, so the machine is slower now: "
        "run it alone, or give speedup, which compares with the dense network"
    )


def _final(drop: Drop, limit: float, level: float) -> dict[str, Any]:
    kept = drop.p_value(limit) <= level
    return {
        "points": drop.value,
        "inputs": drop.inputs,
        "bound": drop.bound(level),
        "is_exact": drop.is_exact,
        "kept": kept,
    }


def _of_drop(limit: float, found: dict[str, Any], scale: Scale) -> Goal:
    sure = f"with confidence {100 * found['confidence']:g} %"
    promised = "nothing"
    if found["bound_promised"] is not None:
        promised = f"at most {scale.number(limit)} points {sure}"
    elif found["expected"] is not None:
        promised = f"about {scale.number(found['expected'])} points after the training"
    measured = f"{scale.number(found['points'])} points on {found['inputs']:,} held-out inputs"
    if found["bound"] is not None:
        measured += f", with a bound of {scale.number(found['bound'])}"
    if "test" in found:
        measured += f"; {scale.number(found['test'])} on {found['test_inputs']:,} test inputs"
    if found["kept"] is None:
        measured += "; the held-out inputs have also chosen the size, so they do not judge"
    return Goal(f"{DROP}={shown(limit)}", promised, measured, found["kept"])


# What training gave back in earlier runs.


def known_drops(config: Config, reference: dict[str, Any], context: Context, folder: Path) -> list[Pair]:
    """The drops before and after training of earlier runs with the same reference, data and training."""
    path = folder / _drops_file(config, reference, context)
    return [(pair[0], pair[1]) for pair in intact(path, DROPS) or [] if len(pair) == 2]


def remember_drops(job: Job, pair: Pair) -> None:
    """Adds the drops of this run to those that later runs know."""
    folder = shared_folder(job.config, job.network)
    path = folder / _drops_file(job.config, job.directory.identity["reference"], job.context)
    known = intact(path, DROPS) or []
    if list(pair) not in known:
        make_folder(folder)
        write_json(path, [*known, list(pair)])


def _drops_file(config: Config, reference: dict[str, Any], context: Context) -> str:
    trained = {
        name: phase.decisive(config.phases[name])
        for name, phase in NETWORK_PHASES.items()
        if name in config.phases and phase.trains
    }
    data = context.required_data.fingerprint
    identity = {"reference": reference, "data": data, "metric": context.metric.name, "training": trained}
    return f"drops-{fingerprint(identity)}.json"
