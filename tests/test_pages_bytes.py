"""The pages where entries have few bits: bits and bytes of layers, and accuracy against bytes with its opponents."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tests.conftest import TINY, Cli, Once
from tspc.compression.plan import Plan
from tspc.compression.settings import PlanSettings
from tspc.pages.benchmark import LATENCY
from tspc.pages.drawing import Drawing, style
from tspc.pages.goals import asked_of, goal_in, order_of_goal, readable_goal
from tspc.pages.records import Run, read_run
from tspc.pages.rows import Row, grid_of, latex_of, markdown_of
from tspc.pages.sweep_figures import references_of, sweep_drawings

QUICK = (*(argument for argument in TINY if argument != "report=false"), "phase=decompose")
NETWORK = Path("outputs/synthetic/resnet8")
RUNS = {
    "cp-size0.08": ("method=cp", "size=0.08"),
    "dense-8bits": ("method=dense", "bits=8"),
    "dense-4bits": ("method=dense", "bits=4"),
    "cp-0.3": ("method=cp", "rate=0.3"),
}


@pytest.fixture
def outputs(once: Once, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs with a size, in few bits and in float32, and their comparison. They are only read."""

    def make(folder: Path) -> None:
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(folder)
            for options in RUNS.values():
                code, _, err = cli(*QUICK, *options)
                assert (code, err) == (0, "")
            assert cli("phase=compare")[0] == 0

    return once("pages-bytes", make)


def result_of(outputs: Path, name: str) -> dict:
    return json.loads((outputs / NETWORK / name / "seed0/result.json").read_text())


def plan_of(outputs: Path, name: str) -> Plan:
    run = read_run(outputs / NETWORK / name / "seed0")
    assert run is not None
    assert run.plan is not None
    return run.plan


def cells_of(page: str, layer: str) -> list[str]:
    """The text of the cells of a layer in the report's table."""
    (row,) = [row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if f'"row">{layer}<' in row]
    return [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)]


@pytest.mark.parametrize("name", ["cp-size0.08", "dense-4bits"])
def test_a_report_shows_bits_and_bytes_of_each_layer(outputs, name):
    page = (outputs / NETWORK / name / "seed0/report.html").read_text()
    plan, sizes = plan_of(outputs, name), result_of(outputs, name)["bytes"]
    assert f"{sizes['after']:,} of {sizes['before']:,} bytes are left" in page
    assert "Where the bytes went" in page
    for number, layer in enumerate(plan.layers):
        assert layer.bits < 32
        known = [str(number + 1), layer.name, layer.kind, "×".join(map(str, layer.shape)), layer.ranks, str(layer.bits)]
        known += [f"{layer.dense_bytes:,}", f"{layer.bytes:,}", f"{100 * layer.bytes / layer.dense_bytes:.3g} %"]
        assert cells_of(page, layer.name)[: len(known)] == known
    assert ("the dashed line is the rank" in page) is (name != "dense-4bits"), "whole kernels have no spectra"


def test_a_report_of_float32_factors_counts_parameters(outputs):
    page = (outputs / NETWORK / "cp-0.3/seed0/report.html").read_text()
    sizes = result_of(outputs, "cp-0.3")["parameters"]
    assert f"{sizes['after']:,} of {sizes['before']:,} parameters are left" in page
    assert "Where the parameters went" in page
    layer = plan_of(outputs, "cp-0.3").tensorized[0]
    known = [layer.factors, f"{layer.dense_params:,}", f"{layer.params:,}"]
    assert cells_of(page, layer.name)[4:7] == known


def test_the_title_and_the_note_of_a_report_say_what_was_asked_for(outputs):
    for name, title, note in (
        ("cp-size0.08", "cp at size 0.08", "Asked: size 0.08. Reached: 0.0[78].. of the bytes of the network; global"),
        ("dense-8bits", "dense in 8 bits", "Asked: 8 bits. Reached: 0.2... of the bytes of the layers that share"),
        ("cp-0.3", "cp at 0.3", "Rate asked 0.3, reached 0.2... of the layers that share the budget; global"),
    ):
        page = (outputs / NETWORK / name / "seed0/report.html").read_text()
        assert f"<h1>resnet8 on synthetic: {title}</h1>" in page
        assert re.search(note, page), name


def test_a_comparison_names_series_goal_bits_and_bytes(outputs):
    rows = {row["run"]: row for row in csv.DictReader((outputs / "outputs/sweep.csv").read_text().splitlines())}
    found = {name: (row["method"], row["goal"], row["bits"]) for name, row in rows.items()}
    assert found == {
        "cp-size0.08": ("cp-size", "size0.08", "auto"),
        "dense-8bits": ("dense", "8bits", "8"),
        "dense-4bits": ("dense", "4bits", "4"),
        "cp-0.3": ("cp", "0.3", "32"),
    }
    for name, row in rows.items():
        assert row["status"] == "done"
        assert int(row["bytes"]) == result_of(outputs, name)["bytes"]["after"]
    page = (outputs / "outputs/sweep.html").read_text()
    assert page.index("Accuracy against bytes") < page.index("Accuracy against rate")
    assert {"dense, 8 bits", "dense, 4 bits", "dense, float32"} <= set(re.findall(r">(dense, [^<]+)<", page))


def test_a_rate_changes_nothing_where_nothing_is_decomposed(cli, tmp_path):
    for rate, is_done in (("0.3", False), ("0.1", True)):
        code, out, err = cli(*TINY, "phase=decompose", "method=dense", "bits=4", f"rate={rate}")
        assert (code, err) == (0, "")
        assert ("done before" in out) is is_done
        assert "of the bytes reached, 4 bits asked" in out
    assert [path.name for path in (tmp_path / NETWORK).iterdir() if path.name != "reference"] == ["dense-4bits"]


def run_of(folder: str, method: str, **settings) -> Run:
    """A run without files: what its directory and `run.json` say."""
    plain = {"rate": 0.2} | settings | {"method": {"name": method}, "dataset": {"name": "d"}, "network": {"name": "n"}}
    return Run(Path(folder) / "seed0", plain, None, [])


def test_runs_of_one_curve_share_a_series():
    small, large = run_of("cp-size0.1", "cp", size="0.1"), run_of("cp-size0.2", "cp", size="0.2")
    assert small.series == large.series == "cp-size"
    assert (small.goal, large.goal) == ("size0.1", "size0.2")
    narrow, plain = run_of("cp-0.2-8bits", "cp", bits="8"), run_of("cp-0.2", "cp")
    assert (narrow.series, plain.series) == ("cp-8bits", "cp")
    assert narrow.goal == plain.goal == "0.2"
    assert (small.bits, narrow.bits, plain.bits) == ("auto", "8", "32")
    both = run_of("cp-size0.1-8bits", "cp", size="0.1", bits="8")
    assert (both.series, both.goal) == ("cp-size-8bits", "size0.1")
    whole = run_of("dense-8bits-mine", "dense", bits="8")
    assert (whole.series, whole.goal) == ("dense-mine", "8bits")


def test_goals_in_words_and_in_order():
    goals = ["8bits", "error0.1", "0.05", "size0.1", "size20kB", "0.2", "4bits", "error0.3", "size1MB", "size0.2"]
    assert sorted(goals, key=order_of_goal) == (
        ["0.2", "0.05", "size1MB", "size20kB", "size0.2", "size0.1", "error0.3", "error0.1", "8bits", "4bits"]
    )
    assert [readable_goal(goal) for goal in ("0.2", "size20kB", "error0.3", "8bits")] == (
        ["0.2", "size 20kB", "error 0.3", "8 bits"]
    )
    assert asked_of("cp", "0.2", "8") == "cp in 8 bits at 0.2"
    assert asked_of("cp", "size0.2", "auto") == "cp at size 0.2"
    assert asked_of("dense", "8bits", "8") == "dense in 8 bits"
    assert [goal_in(given) for given in ({"rate": "0.2"}, {"size": "1kB"}, {"target_error": "0.1"}, {})] == (
        ["0.2", "size1kB", "error0.1", ""]
    )


def test_tables_for_papers_name_sizes_and_widths():
    rows = [Row("", ("d", "n"), *names, "done", final=0.5) for names in (("dense", "8bits"), ("cp-size", "size0.1"))]
    grid = grid_of(rows)
    assert grid is not None
    assert "| method | size 0.1 | 8 bits |" in markdown_of(grid)
    assert r"method & size 0.1 & 8 bits \\" in latex_of(grid)


def test_one_size_has_one_spelling_and_a_rate_without_effect_is_one():
    assert PlanSettings.of("cp", size="500 kB").identity == PlanSettings.of("cp", size="500kB").identity
    assert PlanSettings.of("dense", 0.3, bits=8).identity["rate"] == 1
    assert PlanSettings.of("cp", 0.3, bits=8).identity["rate"] == 0.3
    assert PlanSettings.of("dense", 0.3, bits="auto", rate_unit="bytes").identity["rate"] == 0.3


def row(series: str, goal: str, final: float, size: int, **more) -> Row:
    plain = {
        "reached": 0.5,
        "reference": 0.9,
        "bytes": size,
        "parameters": 7,
        "before": {"bytes": 4000.0, LATENCY: 5.0},
    }
    return Row(f"{series}-{goal}", ("d", "n"), series, goal, "done", final=final, **plain | more)


def drawn(rows: list[Row]) -> dict[str, Drawing]:
    with style():
        return {drawing.name: drawing for drawing in sweep_drawings(rows)}


def words_in(drawing: Drawing) -> set[str]:
    return {text.get_text() for text in drawing.figure.axes[0].texts}


def test_opponents_and_the_reference_are_judged_by_the_same_front():
    rows = [
        row("cp-size", "size0.1", 0.85, 400, bits="auto", unit="bytes", left=0.5),
        row("dense", "8bits", 0.89, 1000, bits="8", unit="bytes", left=1.0, is_whole=True, latency=4.0),
        row("dense", "4bits", 0.7, 500, bits="4", unit="bytes", left=1.0, is_whole=True),
        row("cp", "0.5", 0.88, 2000, left=0.5, latency=3.0),
    ]
    figures = drawn(rows)
    assert list(figures) == ["bytes", "rate", "latency"], "bytes first, because some runs have few bits"
    size = figures["bytes"]
    best = {name for name, mark in size.marks.items() if "Pareto" in mark.tip}
    assert best == {"run0", "run1", "reference0"}
    assert size.marks["reference0"].tip.startswith("reference: dense, float32\n90.00 % top-1\n4 kB")
    assert size.marks["run0"].tip.splitlines()[2] == "400 bytes, 7 parameters"
    assert size.marks["run3"].tip.splitlines()[2] == "rate 0.5000, 7 parameters"
    assert words_in(size) == {"dense, 8 bits", "dense, 4 bits", "dense, float32"}
    assert [key.label for key in size.legend] == ["cp-size", "cp", "not decomposed", "Pareto front", "reference"]
    assert words_in(figures["latency"]) == {"dense, 8 bits", "dense, float32"}
    # Networks that keep all parameters do not belong into a figure of the parameters that are left.
    assert sorted(figures["rate"].marks) == ["run0", "run1"]
    assert words_in(figures["rate"]) == set()


def test_parameters_come_first_where_no_run_has_few_bits():
    figures = drawn([row("cp", "0.2", 0.8, 1000, left=0.2), row("cp", "0.1", 0.9, 500, left=0.1)])
    assert list(figures) == ["rate", "bytes"]
    # A run as good as the reference, and smaller: the reference is not on the front.
    best = {name for name, mark in figures["bytes"].marks.items() if "Pareto" in mark.tip}
    assert best == {"run1"}


def test_the_cost_of_a_reference_is_the_median_of_its_measurements():
    rows = [row("cp", "0.2", 0.8, 1, before={LATENCY: value}) for value in (3.0, 9.0, 4.0)]
    rows += [row("cp", "0.1", 0.8, 1, before={}), row("cp", "0.1", 0.8, 1, reference=None)]
    assert references_of(rows, LATENCY) == [(4.0, 90.0)]
    assert references_of(rows, None) == []


def test_names_that_would_touch_are_written_below_each_other():
    rows = [row("dense", f"{bits}bits", 0.7, size, bits=bits, is_whole=True) for bits, size in (("4", 500), ("3", 510))]
    texts = drawn(rows)["bytes"].figure.axes[0].texts
    (_, first), (_, second) = (t.get_position() for t in texts if "float32" not in t.get_text())
    assert abs(first - second) >= 0.044
