"""What mkdocs does beside reading docs/: the README as the first page, the results, and both references, generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import config_reference  # beside this file, where mkdocs looks while it loads it
from mkdocs.structure.files import File, Files

import tspc

ROOT = Path(__file__).parents[2]

ORDER = (
    "index tutorial howto sentence_encoder speech_recogniser own_task runs tasks contracts methods decomposition"
    " training inference deploy looking original reference/config reference/api contributing results"
).split()
"""Pages in this order; others follow by name."""
LINKS = {
    r"\(docs/": "(",
    r"\((?:\.\./)?benchmarks/RESULTS\.md": "(results.md",
    r"\((?:\.\./)?README\.md": "(index.md",
    r"\((?:\.\./)?CONTRIBUTING\.md": "(contributing.md",
    r"\[([^\]]*)\]\((?:CITATION\.cff|LICENSE|CHANGELOG\.md)\)": r"\1",
}
"""The repository's links, as the site's."""


def on_files(files: Files, config: Any) -> Files:
    generated = {
        "index.md": (ROOT / "README.md").read_text(),
        "results.md": (ROOT / "benchmarks/RESULTS.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "reference/config.md": config_reference.page(),
        "reference/api.md": _api(),
    }
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_nav(nav: Any, **_: Any) -> Any:
    nav.items.sort(key=lambda item: _place((item if item.is_page else item.children[-1]).file.src_uri))
    return nav


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    for pattern, replacement in LINKS.items():
        markdown = re.sub(pattern, replacement, markdown)
    if page.file.src_uri == "results.md":
        markdown = re.sub(r"\(\.\./docs/", "(", markdown)
    return markdown


def _place(name: str) -> int:
    stem = name.removesuffix(".md")
    return ORDER.index(stem) if stem in ORDER else len(ORDER)


def _api() -> str:
    """Every public name, from where it is defined."""
    lines = ["# Library", "", tspc.__doc__.splitlines()[0] if tspc.__doc__ else "", ""]
    for name in tspc.__all__:
        if name in tspc._HOMES:
            lines += [f"::: tspc.{tspc._HOMES[name]}.{name}", ""]
    return "\n".join(lines)
