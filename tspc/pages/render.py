"""Makes pages from Jinja templates; a page contains everything that it needs."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2

from tspc import __version__
from tspc.store.scores import shown, top5_in


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tspc.pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "score": _score,
        "five": _five,
        "json": lambda data: json.dumps(data, indent=2, ensure_ascii=False),
    }
    environment.globals["version"] = __version__
    return environment


def _score(accuracy: dict[str, Any] | None) -> str:
    return shown(accuracy) if accuracy else ""


def _five(accuracy: dict[str, Any] | None) -> str:
    return "" if (share := top5_in(accuracy)) is None else f"{100 * share:.2f} %"


def render(template: str, **content: Any) -> str:
    """The page made from a template and its content."""
    return _environment().get_template(template).render(**content)
