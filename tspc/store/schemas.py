"""The schemas of a run's records, and a check that says what is wrong with a record.

A schema is plain data, too: a type; a `Number`; None; a list of one schema for lists; a mapping for mappings; a tuple
of schemas for alternatives. The keys of a mapping are required unless they end in `?`; `...` stands for keys of any
name. Further keys are allowed, because another version may have written them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

DEEPEST = 50
"""The largest number of levels of a record; code that walks over deeper ones could exhaust its stack."""
_WORDS = {str: "text", bool: "true or false", dict: "a mapping", list: "a list", None: "null"}


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; `whole` if it must be one. NaN and infinity pass only with `any_float`."""

    low: float = -1e300
    high: float = 1e300
    whole: bool = False
    any_float: bool = False

    def accepts(self, data: Any) -> bool:
        if isinstance(data, bool) or not isinstance(data, int if self.whole else int | float):
            return False
        if isinstance(data, float) and not math.isfinite(data):
            return self.any_float
        return self.low <= data <= self.high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return (
            f"{kind} from {self.low:g} to {self.high:g}" if abs(self.high) < 1e18 else f"{kind}, at least {self.low:g}"
        )


COUNT, SIZE = Number(0, 2**63, whole=True), Number(1, 2**63, whole=True)
SHARE, POSITIVE, SECONDS = Number(0, 1), Number(1e-300), Number(0, 1e15)
ERROR = (Number(0, any_float=True), None)

OTHER_METRIC = {"metric": str, "value": Number(), "images": COUNT}
ACCURACY = ({"top1": SHARE, "top5?": (SHARE, None), "images": SIZE}, OTHER_METRIC)
"""A measurement: of top-1, or of another metric that the user named."""
_MEASURED = {"accuracy": (ACCURACY, None)}
_SIZES = {"before": SIZE, "after": COUNT}

METRICS = {
    **dict.fromkeys(("phase?", "event?", "block?", "layer?"), str),
    **{"step?": COUNT, "loss?": Number(), "seconds_before?": SECONDS},
}
"""A line of `metrics.jsonl`."""

IDENTITY = {
    "method": {"name": str},
    "rate?": (Number(), None),
    "target_error?": (Number(), None),
    "dataset": {"name": str},
    "network": {"name": str},
    "seed?": (Number(-(2**63), 2**64, whole=True), None),
    **dict.fromkeys(("size?", "bits?"), (str, None)),
    **dict.fromkeys(("rate_unit?", "metric?"), str),
}
"""`run.json`, as far as a page shows it."""

BENCHMARK_SHOWN = {
    "cost?": ({"dense?": {"macs": COUNT}, "compressed?": {"macs": COUNT}}, None),
    "timings?": (
        [
            (
                {"skipped": str},
                {
                    "runtime": str,
                    "batch_size": SIZE,
                    "skipped?": None,
                    "dense": {"median": POSITIVE},
                    "compressed": {"median": POSITIVE},
                },
            )
        ],
        None,
    ),
}
EXPORTED = {
    "file": str,
    "bytes": COUNT,
    "runtime?": (str, None),
    "precision?": str,
    "accuracy?": (ACCURACY, None),
}
"""A file of `phase=export`, as far as a page shows it. Earlier versions did not measure its accuracy."""
_POINTS = {"points": Number(), "inputs": SIZE}
CONTRACT = {
    "state": str,
    "goals": [{**dict.fromkeys(("goal", "promised", "measured"), str), "kept": (bool, None)}],
    "drop?": ({"limit": POSITIVE}, None),
    "time?": ({"limit": POSITIVE}, None),
}
"""What a run was asked for, promised, and measured."""
DROPS = [[Number()]]
"""The drops of networks before and after their training."""
RESULT = {
    "contract?": (CONTRACT, None),
    "rate": POSITIVE,
    "rate_reached": Number(0),
    **dict.fromkeys(("allocation", "rate_scope", "network", "device"), str),
    "reference": _MEASURED | {"seconds?": (SECONDS, None), "source": str},
    "phases": {...: _MEASURED | {"seconds": SECONDS}},
    "accuracy": (ACCURACY, None),
    "parameters": _SIZES,
    "bytes": _SIZES,
    "seed": int,
    "versions": dict,
    "settings?": dict,
    **dict.fromkeys(("size?", "bits?"), (str, None)),
    "rate_unit?": str,
    "benchmark?": (BENCHMARK_SHOWN, None),
    "export?": ({"accuracy?": (ACCURACY, None), "files": [EXPORTED]}, None),
}
"""`result.json`."""

_POINT = {"goal": str, "bytes": COUNT, "error": (Number(0), None), "seconds": (POSITIVE, None)}
FRONTIER = {
    "method": str,
    "runtime": (str, None),
    "dense": {"bytes": SIZE, "seconds": (POSITIVE, None)},
    **{key: [_POINT] for key in ("by_size", "by_time")},
}
"""`frontier.json` beside a reference."""

SPECTRA = [{"layer": str, "method": str, "rank": SIZE, "kept?": SIZE, "values": [Number(0)]}]
_OUTCOME = {
    "directory": str,
    "rate_reached?": Number(0),
    "reference?": _MEASURED,
    "accuracy?": (ACCURACY, None),
    "parameters?": _SIZES,
    "bytes?": _SIZES,
    "bits?": (str, None),
    "size?": (str, None),
}
JOB = {"job": COUNT, "overrides": [str], "result": (_OUTCOME, None), "error": (str, None)}
"""The record of a job of a sweep. It has a result or an error."""

_LAYER = {
    "name": str,
    "kind": str,
    "shape": [SIZE],
    **dict.fromkeys(("dense_params", "params"), COUNT),
    "method": (dict, None),
    "rank": ([SIZE], None),
    **dict.fromkeys(("reason", "note?", "path?"), (str, None)),
    **dict.fromkeys(("error", "output_error"), ERROR),
    **dict.fromkeys(("bits?", "entry_bytes?"), COUNT),
    **dict.fromkeys(("has_narrow_bias?", "is_whole?"), bool),
}
PROMISE = {
    **dict.fromkeys(("limit", "runtime"), str),
    **dict.fromkeys(("batch", "threads"), SIZE),
    **dict.fromkeys(("dense_seconds", "seconds"), POSITIVE),
}
"""What a plan under a limit on the time was measured to take, with random factors."""
JUDGED = {
    "max_drop": POSITIVE,
    "confidence": SHARE,
    "is_exact": bool,
    "drop?": (_POINTS, None),
    "bound?": (Number(), None),
    "tried": [{"share": POSITIVE, "bytes": COUNT, "passed?": (bool, None)}],
}
"""What held-out inputs said of the networks that a search tried, and of the one that it chose."""
PLAN = {
    "method": dict,
    "rate": POSITIVE,
    **dict.fromkeys(("rate_decay", "rate_scope", "allocation", "objective?"), str),
    "layers": [_LAYER],
    "beside?": [{**dict.fromkeys(("name", "kind", "reason"), str), "shape": [COUNT], "params": COUNT, "bytes": COUNT}],
    "network_dense_params": SIZE,
    "network_dense_bytes?": SIZE,
    **dict.fromkeys(("beside_saved?", "vectors_saved?"), COUNT),
    "kept?": [str],
    "rate_unit?": str,
    "promise?": (PROMISE, None),
    "judged?": (JUDGED, None),
}
FINISHED = {
    "settings": dict,
    "after": str,
    "fingerprint": str,
    "seconds": SECONDS,
    "data": (str, None),
    "accuracy": (ACCURACY, None),
    "plan": (PLAN, None),
}
"""What a finished phase tells in the header of its network's file."""

_CURVE = {"method": dict, "params": [COUNT], "errors": [Number(0)], "dense": SIZE, "weight": Number(0)}
CURVES = {...: [_CURVE | {"rounding?": [[Number(0)]]}]}
"""`curves-*.json` beside a reference."""

LAYER_TIMES = {
    **dict.fromkeys(("machine", "runtime", "version"), str),
    **dict.fromkeys(("batch", "threads"), SIZE),
    "seconds": {...: POSITIVE},
}
"""A table of the times of single layers, in the user's folder for caches."""


def problem(data: Any, schema: Any) -> str | None:
    """What is wrong with data that was read from a file; None if it fits the schema."""
    return f"deeper than {DEEPEST} levels" if _is_deep(data) else _problem(data, schema, "")


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(DEEPEST):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _problem(data: Any, schema: Any, where: str) -> str | None:
    if isinstance(schema, tuple):
        found = [_problem(data, each, where) for each in schema]
        return None if None in found else found[0]
    if isinstance(schema, dict) and isinstance(data, dict):
        return _problem_of_mapping(data, schema, where)
    if isinstance(schema, list) and isinstance(data, list):
        if isinstance(schema[0], Number) and all(map(schema[0].accepts, data)):  # of spectra there are millions
            return None
        entries = (_problem(each, schema[0], f"{where}[{place}]") for place, each in enumerate(data))
        return next(filter(None, entries), None)
    if isinstance(schema, Number):
        fits, expected = schema.accepts(data), str(schema)
    else:
        kind = type(schema) if isinstance(schema, dict | list) else schema
        fits = data is None if kind is None else isinstance(data, kind)
        expected = _WORDS.get(kind, "a whole number")
    return None if fits else f"{where or 'the whole'}: expected {expected}, found {_brief(data)}"


def _problem_of_mapping(data: dict[str, Any], schema: dict[Any, Any], where: str) -> str | None:
    below = f"{where}." if where else ""
    for key, inner in schema.items():
        names = list(data) if key is ... else [key.removesuffix("?")]
        for name in names:
            if name not in data:
                if key.endswith("?"):
                    continue
                return f"{below}{name} is missing"
            wrong = _problem(data[name], inner, f"{below}{name}")
            if wrong is not None:
                return wrong
    return None


def _brief(data: Any) -> str:
    if isinstance(data, dict | list):
        return f"{_WORDS[type(data)]} of {len(data)}"
    text = (
        repr(data)
        if isinstance(data, str | float | bool | None)
        else f"{data:.6g}"
        if abs(data) < 1e300
        else "a huge number"
    )
    return text if len(text) <= 40 else f"{text[:37]}…"
