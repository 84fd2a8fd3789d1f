"""The tutorial's code runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    """The Python in a page, each block at its own line, so that an error names the page's."""
    text = (DOCS / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def test_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("tutorial.md")
    assert len(found) == 4
    for block in found:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
    out = capsys.readouterr().out
    assert "dense: first convolution" in out
    assert {path.name for path in tmp_path.iterdir()} == {"small.safetensors", "small.pt2"}


def test_its_heart_is_ten_lines():
    ten = [line for line in blocks("tutorial.md")[1].splitlines() if line.strip()]
    assert len(ten) <= 10
