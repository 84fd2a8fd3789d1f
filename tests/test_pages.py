"""`report.html` and `sweep.html`: made from real runs, opened in a browser, without network."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.browser import Browser, browser  # noqa: F401
from tests.conftest import TINY, Cli, Once
from tspc.compression.plan import LayerPlan
from tspc.decompositions import METHODS
from tspc.errors import RunError
from tspc.pages import write_report
from tspc.pages.records import DONE, STOPPED, read_run
from tspc.pages.report import _SPARK, _spark
from tspc.pages.rows import Row, grid_of, latex_of, markdown_of
from tspc.pages.run_figures import last_attempt, thinned
from tspc.pages.sweep_figures import pareto
from tspc.phases.spectra import spectra_of

QUICK = tuple(argument for argument in TINY if argument != "report=false")
RUN = Path("outputs/synthetic/resnet8/tt-0.2/seed0")


@pytest.fixture
def outputs(once: Once, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep with jobs that fail. Copy what a test changes."""

    def make(folder: Path) -> None:
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(folder)
            code, out, err = cli("-m", *QUICK, "method=svd,tt", "rate=0.4,0.2,0.001")
        assert code == 1, err
        assert "sweep.html" in out

    return once("pages", make)


def page_of_sweep(outputs: Path) -> Path:
    (page,) = outputs.glob("outputs/multirun/*/sweep.html")
    return page


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_report_in_the_browser(outputs, browser: Browser, scheme, width):  # noqa: F811
    browser.open(outputs / RUN / "report.html", width, scheme)
    titles = browser.ask("return [...document.querySelectorAll('figure svg.plot > title')].map(t => t.textContent)")
    names = "accuracy loss-pretrain loss-distill loss-finetune layers spectra".split()
    assert len(titles) == len(set(titles)) == len(names)
    drawn = browser.ask("return [...document.querySelectorAll('svg.plot')].map(s => s.getBoundingClientRect().height)")
    assert min(drawn) > 100
    for name in names:
        assert (outputs / RUN / f"figures/{name}.png").stat().st_size > 5000
        assert (outputs / RUN / f"figures/{name}.svg").read_text().startswith("<?xml")
    ids = browser.ask("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)), "figures do not share names"
    # Contrast of the text against the page, as WCAG counts it.
    light = browser.ask(
        "const l = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : "
        "((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
        "const page = l(getComputedStyle(document.body).backgroundColor);"
        "return [page, ...[...document.querySelectorAll('.note, p, th, td, a, figcaption')]"
        ".map(e => l(getComputedStyle(e).color))];"
    )
    page, *texts = light
    assert (page < 0.1) is (scheme == "dark")
    assert min((max(page, t) + 0.05) / (min(page, t) + 0.05) for t in texts) >= 4.5


def test_a_report_says_what_the_result_says(outputs):
    text = (outputs / RUN / "report.html").read_text()
    result = json.loads((outputs / RUN / "result.json").read_text())
    for part in (
        f"{result['parameters']['after']:,} of {result['parameters']['before']:,} parameters are left",
        f"{100 * result['accuracy']['top1']:.2f} %",
        "rate=0.2",
        "not measured: phase=benchmark",
        result["versions"]["torch"],
        "layer3.0.conv2",
    ):
        assert part in text
    assert result["command"].startswith("tspc dataset=synthetic")
    assert result["settings"]["method"] == {"name": "tt", "solver": "native"}


def test_tables_sort_by_mouse_and_keyboard(outputs, browser: Browser):  # noqa: F811
    from selenium.webdriver.common.keys import Keys

    browser.open(outputs / RUN / "report.html")
    column = "return [...document.querySelectorAll('.layers tbody tr')].map(r => Number(r.cells[6].dataset.v))"
    button = browser.driver.find_elements("css selector", ".layers th button")[6]
    button.click()
    assert browser.ask(column) == sorted(browser.ask(column))
    button.send_keys(Keys.ENTER)
    assert browser.ask(column) == sorted(browser.ask(column), reverse=True)
    assert browser.ask("return document.querySelector('.layers th[aria-sort]').ariaSort") == "descending"


def test_a_benchmark_is_shown_and_compared(outputs, tmp_path):
    run = tmp_path / "one/seed0"
    shutil.copytree(outputs / RUN, run)
    side = {"median": 0.004, "p95": 0.005, "throughput": 250.0}
    timing = {
        "runtime": "eager",
        "batch_size": 1,
        "skipped": None,
        "dense": side,
        "compressed": side | {"median": 2e-3},
    }
    cost = {"dense": {"macs": 4_000_000}, "compressed": {"macs": 1_000_000}}
    result = json.loads((run / "result.json").read_text())
    result["benchmark"] = {"cost": cost, "timings": [timing], "device": "cpu"}
    (run / "result.json").write_text(json.dumps(result))
    text = write_report(run).read_text()
    assert "4 ms" in text
    assert "2.00× faster; eager, batch of 1, cpu" in text
    assert "4.00× smaller; one input" in text
    assert "not measured: phase=benchmark" not in text


def test_a_sweep_in_the_browser(outputs, browser: Browser):  # noqa: F811
    for width, scheme in ((1280, "light"), (400, "dark")):
        browser.open(page_of_sweep(outputs), width, scheme)
    marks = browser.ask("return [...document.querySelectorAll('a.mark')].map(m => [m.dataset.tip, m.href.baseVal])")
    assert len(marks) == 2 * 4, "each run in the figure of rates and in that of bytes"
    assert all("% top-1" in tip for tip, _ in marks)
    assert sum("Pareto" in tip for tip, _ in marks) >= 2
    for _, link in marks:
        assert (page_of_sweep(outputs).parent / link).is_file()
    browser.ask("document.querySelector('a.mark').focus()")
    assert browser.ask("return document.getElementById('tip').textContent").startswith("svd-0.4")
    assert browser.ask("return document.getElementById('tip').hidden") is False
    assert len(browser.ask("return [...document.querySelectorAll('.failed dt')]")) == 2
    assert "cannot be met" in browser.ask("return document.querySelector('.failed dd').textContent")


def test_a_comparison_of_runs_that_are_done_or_not(outputs, cli, tmp_path, browser: Browser):  # noqa: F811
    shutil.copytree(outputs / "outputs/synthetic", tmp_path / "outputs/synthetic")
    stopped = tmp_path / "outputs/synthetic/resnet8/svd-0.4/seed0"
    for name in ("result.json", "finetune.safetensors", "report.html"):
        (stopped / name).unlink()
    failed = tmp_path / "outputs/synthetic/resnet8/svd-0.2/seed0/metrics.jsonl"
    failed.write_text(failed.read_text() + json.dumps({"event": "failed", "error": "the loss is nan"}) + '\n{"half')
    (tmp_path / RUN / "report.html").unlink()
    code, out, err = cli("phase=compare", "runs=outputs/synthetic/**")
    assert (code, err) == (0, "")
    assert "outputs/synthetic/sweep.html" in out
    assert (tmp_path / RUN / "report.html").exists(), "made where there was none"
    rows = list(csv.DictReader((tmp_path / "outputs/synthetic/sweep.csv").read_text().splitlines()))
    assert {row["run"]: row["status"] for row in rows} == {
        "svd-0.4": "stopped",
        "svd-0.2": "failed",
        "tt-0.4": "done",
        "tt-0.2": "done",
    }
    browser.open(tmp_path / "outputs/synthetic/sweep.html")
    assert browser.ask("return document.querySelector('.crumbs').textContent") == "4 runs: 1 stopped, 1 failed, 2 done"
    code, _, err = cli("phase=compare", "runs=nothing/**")
    assert (code, err.count("\n")) == (1, 1)
    assert "no run there" in err


def test_damaged_runs_take_no_other_along(outputs, cli, tmp_path):
    shutil.copytree(outputs / "outputs/synthetic", tmp_path / "outputs/synthetic")
    runs = {name: tmp_path / f"outputs/synthetic/resnet8/{name}/seed0" for name in ("svd-0.4", "svd-0.2", "tt-0.4")}
    (runs["svd-0.4"] / "result.json").write_text('{"method": ')
    result = json.loads((runs["svd-0.2"] / "result.json").read_text())
    del result["rate_reached"]
    (runs["svd-0.2"] / "result.json").write_text(json.dumps(result))
    (runs["tt-0.4"] / "run.json").write_text('{"method": {}}')
    code, _, err = cli("phase=compare", "runs=outputs/synthetic/**")
    assert (code, err) == (0, "")
    rows = {row["run"]: row for row in csv.DictReader(Path("outputs/synthetic/sweep.csv").read_text().splitlines())}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(runs, "damaged") | {"tt-0.2": "done"}
    assert "result.json" in rows["svd-0.4"]["error"]
    assert "result.json: rate_reached is missing" in rows["svd-0.2"]["error"]
    page = Path("outputs/synthetic/sweep.html").read_text()
    assert page.count('class="status-damaged"') == 3
    assert "svd-0.2/seed0 is damaged or incomplete" in page


def test_a_later_phase_that_was_stopped_is_not_done(outputs, cli, tmp_path):
    shutil.copytree(outputs / "outputs/synthetic", tmp_path / "outputs/synthetic")
    run = tmp_path / RUN
    assert read_run(run).status == DONE  # type: ignore[union-attr]
    (run / "finetune.safetensors").unlink()
    (run / "finetune.progress.pt").write_bytes(b"some steps")
    only = ("phase=export", "phase.export.formats=[safetensors]")
    code, out, err = cli(*QUICK, *only)
    assert (code, err) == (0, "")
    assert out.count("finetune was stopped before its end; this is the network after distill") == 1
    assert read_run(run).status == STOPPED  # type: ignore[union-attr]


def test_a_page_that_cannot_be_made_costs_no_result(cli, tmp_path):
    run = tmp_path / "outputs/synthetic/resnet8/tt-0.2/seed0"
    run.mkdir(parents=True)
    (run / "figures").write_text("in the way")
    code, out, err = cli(*QUICK)
    assert (code, err) == (0, "")
    assert "page       not made" in out
    assert (run / "result.json").exists()
    with pytest.raises(RunError, match="no finished run"):
        write_report(tmp_path)


@pytest.mark.slow
def test_500_layers_open_fast_and_stay_small(outputs, tmp_path, browser: Browser):  # noqa: F811
    from tspc.compression import checkpoint

    run = tmp_path / "large/seed0"
    shutil.copytree(outputs / RUN, run)
    path = run / "decompose.safetensors"
    header, state = checkpoint.read(path)
    layers = header["info"]["plan"]["layers"]
    header["info"]["plan"]["layers"] = [layers[i % len(layers)] | {"name": f"stage{i}.conv"} for i in range(500)]
    import safetensors.torch

    safetensors.torch.save_file(state, path, {"tspc": json.dumps(header)})
    values = [0.99**i for i in range(2048)]
    spectra = [
        {"layer": f"stage{i}.conv", "method": "tt", "entry": e, "rank": 40, "values": values}
        for i in range(500)
        for e in range(3)
    ]
    (run / "spectra.json").write_text(json.dumps(spectra))
    page = write_report(run)
    assert page.stat().st_size < 5e6
    assert browser.open(page) < 2000
    assert browser.ask("return document.querySelectorAll('.layers tbody tr').length") == 500


def test_pareto_front():
    points = [(1.0, 50.0), (2.0, 40.0), (2.0, 60.0), (0.5, 10.0), (3.0, 60.0)]
    assert pareto(points) == [3, 0, 2]


def test_a_curve_is_that_of_the_last_attempt():
    start = {"phase": "finetune", "event": "start", "seconds_before": 0.0}
    steps = [{"phase": "finetune", "step": n, "loss": 1.0 / n} for n in (1, 2, 3)]
    again = [start, {"phase": "finetune", "step": 1, "loss": 9.0}]
    assert last_attempt("finetune", [start, *steps, *again]) == again[1:]
    gone_on = [start | {"seconds_before": 3.0}, {"phase": "finetune", "step": 3, "loss": 5.0}]
    assert [r["loss"] for r in last_attempt("finetune", [start, *steps, *gone_on])] == [1.0, 0.5, 5.0]


def test_thinning_keeps_both_ends():
    assert thinned(5) == [0, 1, 2, 3, 4]
    chosen = thinned(5000)
    assert len(chosen) <= 64
    assert (chosen[0], chosen[-1]) == (0, 4999)
    assert chosen[:10] == list(range(10))


def test_the_mark_of_a_spectrum_is_at_the_last_value_that_is_kept():
    spectrum = {"layer": "a", "method": "tr", "entry": 0, "rank": 2, "values": [1.0, 0.8, 0.6, 0.4, 0.2]}
    assert _spark(spectrum | {"kept": 4})["x"] == 0.75 * _SPARK[0]
    assert _spark(spectrum)["x"] == 0.25 * _SPARK[0], "a file of an earlier version"


@pytest.mark.parametrize(("name", "rank", "kept"), [("tr", (2, 2, 3, 2), (4, 4, 6, 4)), ("cp", (40,), (9,))])
def test_spectra_tell_how_many_values_a_rank_can_keep(name, rank, kept):
    torch.manual_seed(0)
    row = LayerPlan("a", "Conv2d", (9, 6, 3, 3), 9 * 6 * 9, 9 * 6 * 9, METHODS[name](), rank)
    found = spectra_of(row, torch.randn(row.shape), None)
    assert tuple(spectrum.rank for spectrum in found) == rank
    assert tuple(spectrum.kept for spectrum in found) == kept


def test_tables_for_papers():
    def row(series: str, goal: str, final: float, seed: int) -> Row:
        return Row("", ("d", "n"), series, goal, "done", seed=seed, reference=0.9, final=final)

    grid = grid_of(
        [row("tt", "0.1", 0.5, 0), row("tt", "0.1", 0.7, 1), row("cp", "0.1", 0.8, 0), row("cp", "0.2", 0.9, 0)]
    )
    assert grid is not None
    assert grid.goals == ["0.2", "0.1"]
    assert "| tt |  | 60.00 ± 14.14 |" in markdown_of(grid)
    assert "| cp | **90.00** | **80.00** |" in markdown_of(grid)
    assert r"cp & \textbf{90.00} & \textbf{80.00} \\" in latex_of(grid)
