"""Makes pages from Jinja templates; a page contains everything that it needs."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2

from tspc import __version__


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tspc.pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "json": lambda data: json.dumps(data, indent=2, ensure_ascii=False)}
    environment.globals["version"] = __version__
    return environment


def _percent(accuracy: dict[str, Any] | None, which: str = "top1") -> str:
    return "" if not accuracy or accuracy.get(which) is None else f"{100 * accuracy[which]:.2f} %"


def render(template: str, **content: Any) -> str:
    """The page made from a template and its content."""
    return _environment().get_template(template).render(**content)
