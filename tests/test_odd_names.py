"""Names with signs that mean something to a spreadsheet, to mathtext, to XML, to LaTeX or to a glob are only names."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import TINY
from tspc.compression.plan import LayerPlan, Plan
from tspc.pages.drawing import legible, style
from tspc.pages.records import read_run, split_pattern
from tspc.pages.rows import Row, csv_of, grid_of, latex_of, markdown_of
from tspc.pages.run_figures import run_drawings
from tspc.pages.sweep_figures import sweep_drawings

NAMES = (
    *("$", r"\frac{", r"$\frac{$", "$x_{$", "a_b^c", "50 %", "{}", "{0}", "%s", "#1", "~", "&amp;"),
    *("bell\a", "null\0", "line\nfeed", "\r\n", "tab\t", "half \ud800", "\x1b[31mred", "\x85", "\u2028"),
    *("שלום", "\u202eright to left", "层", "😀", "e\u0301", "_hidden", "", " ", "a" * 5000, "$" * 3000),
    *("<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", "</title>", "]]>", "[red]x[/red]", "[/]"),
)


def plan_of(names: tuple[str, ...]) -> Plan:
    from tspc.decompositions import resolve

    layers = tuple(LayerPlan(name, "Conv2d", (4, 4, 3, 3), 144, 40, output_error=0.1) for name in names)
    return Plan(resolve("tt"), 0.2, "flat", "layers", "global", layers, 1000)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [NAMES[:20], NAMES[20:], ("$\\frac{$",), ("a" * 10_000,)])
def test_layers_of_any_name_are_drawn_and_put_into_a_page(tmp_path, names):
    run = read_run_with(tmp_path, plan_of(names))
    with style():
        drawn = {drawing.name: drawing.put(tmp_path) for drawing in run_drawings(run)}
    assert {"layers", "spectra"} <= set(drawn)
    for name, found in drawn.items():
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        texts = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
        if name == "layers":
            assert {legible(each).strip() for each in names} - {""} <= {text.strip() for text in texts}
        assert "<script" not in found["svg"]
        assert "<img" not in found["svg"]
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def read_run_with(folder: Path, plan: Plan):
    """A run whose plan has these layers, with a spectrum for each."""
    identity = {"method": {"name": "tt"}, "rate": 0.2, "dataset": {"name": "d"}, "network": {"name": "n"}}
    (folder / "run.json").write_text(json.dumps(identity))
    run = read_run(folder)
    assert run is not None
    values = [1.0, 0.5, 0.25]
    spectra = [{"layer": x.name, "method": "tt", "entry": 0, "rank": 2, "values": values} for x in plan.layers]
    accuracy = {"top1": 0.5, "top5": None, "images": 10}
    result = {"reference": {"accuracy": accuracy}, "phases": {"decompose": {"accuracy": accuracy}}}
    run = dataclasses.replace(run, result=result)
    run.__dict__["_found"] = ({"decompose": {"plan": plan.to_dict()}}, spectra, [])
    return run


def test_a_name_in_a_figure_is_one_short_line():
    assert legible("layer3.0.conv2") == "layer3.0.conv2"
    assert legible("a\nb\0c\u202ed\ud800") == "a�b�c�d�"
    assert legible("שלום") == "שלום"
    assert legible("a" * 30 + "b" * 30 + "c", 11) == "aaaaa…bbbbc"
    assert len(legible("x" * 10_000)) == 60


def rows_of(names: tuple[str, ...]) -> list[Row]:
    return [
        Row(name, ("data" + name, "net" + name), name, "0.2", "done", reference=0.9, final=0.5, reached=0.2, error=name)
        for name in names
    ]


def test_series_of_any_name_are_drawn(tmp_path):
    rows = rows_of(NAMES)
    with style():
        for drawing in sweep_drawings(rows):
            drawing.put(tmp_path)
            ElementTree.parse(tmp_path / f"{drawing.name}.svg")


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", "=cmd|' /C calc'!A0", '"=1']
)
def test_no_cell_of_a_table_is_a_formula(name):
    text = csv_of(rows_of((name,)))
    (row,) = csv.DictReader(io.StringIO(text))
    for key in ("run", "method", "dataset", "network", "error"):
        assert row[key].lstrip()[:1] not in ("=", "+", "-", "@", "\uff1d", ""), key
        assert row[key][:1] not in ("\t", "\r", "\n")
    assert row["run"].endswith(name.strip()[1:])
    assert (row["final"], row["reached" if "reached" in row else "rate_reached"]) == ("0.5", "0.2")


def test_numbers_below_zero_stay_numbers():
    (row,) = csv.DictReader(io.StringIO(csv_of([Row("a", ("d", "n"), "tt", "0.2", "done", seed=-3, macs=-0.5)])))
    assert (row["seed"], row["macs"], row["run"]) == ("-3", "-0.5", "a")


def test_tables_for_papers_take_names_for_text():
    grid = grid_of([Row("", ("d", "n"), r"a_b|50%&\x{$}", "0.2", "done", final=0.5)])
    assert grid is not None
    assert r"a\_b|50\%\&\textbackslash{}x\{\$\}" + " & " in latex_of(grid)
    assert r"| a_b\|50%&\\x{\$} |" in markdown_of(grid)


def test_a_folder_of_that_name_is_no_wildcard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a[b]/*x").mkdir(parents=True)
    assert split_pattern("a[b]/**") == (Path("a[b]"), "**")
    assert split_pattern("a[b]/*x/s?") == (Path("a[b]/*x"), "s?")
    assert split_pattern("a[c]/x") == (Path(), "a[c]/x")
    assert split_pattern("out") == (Path("out"), "")


@pytest.mark.slow
def test_runs_in_a_folder_with_wildcards_in_its_name(cli, tmp_path):
    odd = "a[b]#1%20 {x}"
    quick = [argument for argument in TINY if argument != "report=false"]
    assert cli(*quick, "phase=[pretrain,decompose]", f"output_dir='{odd}'")[0] == 0
    code, out, err = cli("phase=compare", f"output_dir='{odd}'")
    assert (code, err) == (0, "")
    assert f"compared   {odd}/sweep.html" in out
    shutil.move(tmp_path / odd / "synthetic/resnet8/tt-0.2", tmp_path / odd / "synthetic/resnet8/tt-0.2-#%41?[b]")
    assert cli("phase=compare", f"output_dir='{odd}'")[0] == 0
    page = (tmp_path / odd / "sweep.html").read_text()
    assert 'href="synthetic/resnet8/tt-0.2-%23%2541%3F%5Bb%5D/seed0/report.html"' in page
    assert len(list(csv.DictReader((tmp_path / odd / "sweep.csv").read_text().splitlines()))) == 1
