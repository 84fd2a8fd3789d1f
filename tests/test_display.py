"""What the command shows: a live checklist on a terminal, plain lines elsewhere, nothing where it shall be quiet."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import TINY
from tspc.compression.form import DENSE
from tspc.compression.plan import LayerPlan, Plan
from tspc.decompositions import resolve
from tspc.errors import InfeasibleRateError
from tspc.terminal.checklist import sparkline
from tspc.terminal.display import PLAIN_WIDTH, Display
from tspc.terminal.tables import plan_table, rates_table

ROOT = Path(__file__).parent.parent
SECONDS = re.compile(r"\d+\.\d s|\d+ s left")


def terminal(width: int, **options) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=40, _environ={"TERM": "xterm"}, **options
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_phases(display: Display) -> None:
    with display.checklist(["reference", "decompose", "distill"]):
        display.finished("reference", "resnet8: top-1 90.00 %", {"top1": 0.9, "images": 1})
        with display.bar("plan      4 layers", 4) as bar:
            bar.advance(4, "conv1")
        display.finished("decompose", "top-1 88.00 %", {"top1": 0.88, "images": 1})
        with display.bar("distill   block 1/2 layer1 with a name that is rather long for a terminal", 10) as bar:
            for step in range(10):
                bar.advance(step + 1, f"loss {1 / (step + 1):.3f}", 1 / (step + 1))
            display.line("a line in between " + "x" * 150)
        display.finished("distill", "top-1 91.00 %", {"top1": 0.91, "images": 1})


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_checklist_on_a_terminal(width):
    console = terminal(width, color_system=None)
    run_phases(Display(console))
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written(console))
    assert all(len(line) <= width for line in text.splitlines()), "nothing is longer than the terminal"
    last = [line.rstrip() for line in text.splitlines() if line.strip()][-3:]
    assert [line[:1] for line in last] == ["✓"] * 3
    assert "top-1 90.00 %" in last[0]
    assert "-2.00" in last[1]
    assert "+1.00" in last[2]


def test_no_colour_where_none_is_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=40)
    run_phases(Display(console))
    assert not re.search(r"\x1b\[[\d;]*3\dm", written(console))


def test_letters_where_the_terminal_knows_no_others():
    class Ascii(io.StringIO):
        encoding = "ascii"  # type: ignore[assignment]

    console = Console(file=Ascii(), force_terminal=True, width=80, height=40, color_system=None, safe_box=True)
    run_phases(Display(console))
    assert "✓" not in written(console)
    assert "x distill" in written(console)


@pytest.mark.parametrize("verbosity", ["quiet", "normal", "debug"])
def test_plain_lines_in_a_pipe(verbosity):
    console = Console(file=io.StringIO(), width=80)
    display = Display(console, verbosity=verbosity)
    run_phases(display)
    display.warn("something is amiss")
    text = written(console)
    assert "\x1b" not in text
    assert "something is amiss" in text
    assert ("distill    top-1 91.00 %" in text) is (verbosity != "quiet")
    assert console.width == PLAIN_WIDTH


def test_sparklines():
    assert sparkline([]) == sparkline([1.0]) == ""
    assert sparkline([8.0, 4.0, 1.0]) == "█▄▁"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁▁"
    assert len(sparkline([float(v) for v in range(1000)])) <= 20


def test_a_quiet_run_says_nothing_and_keeps_its_log(cli, tmp_path):
    code, out, err = cli(*TINY, "verbosity=quiet", "phase=decompose")
    assert (code, out, err) == (0, "", "")
    assert "decompose" in (tmp_path / "outputs/synthetic/resnet8/tt-0.2/seed0/tspc.log").read_text()


def test_warnings_of_libraries_go_to_the_log(cli, tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text(
        "import warnings\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)\n        self.c = nn.Linear(8, 10)\n\n"
        "    def forward(self, x):\n        warnings.warn('old habits')\n"
        "        return self.c(self.b(self.a(x)).mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = cli(*TINY, "model=custom", "model.factory=noisy:Net", "pretrained=random", "rate=0.8")
    assert (code, err) == (0, "")
    assert "old habits" not in out
    (log,) = tmp_path.glob("outputs/**/tspc.log")
    assert "old habits" in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_sweep_on_a_real_terminal(tmp_path):
    """A real terminal of 80 columns: each job's checklist ends with all phases done."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
    command = [sys.executable, "-m", "tspc", "-m", *TINY, "method=tk,tt", "phase=[decompose,distill]"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output.decode())
    assert len(re.findall(r"✓ distill +top-1", text)) >= 2
    assert "Sweep" in text


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return written(console)


def test_the_table_of_a_plan_tells_bits_and_bytes_where_entries_have_few_bits():
    row = LayerPlan("a", "Linear", (20, 16), 340, 4 * 36 + 20, resolve("svd"), (4,), bits=8, path="chain")
    kept = LayerPlan("b", "Linear", (10, 20), 200, 200, DENSE, (), "final layer", bits=4)
    plan = Plan(resolve("svd"), 0.3, "flat", "network", "global", (row, kept), 600, "parameters", "bytes", 2500)
    # 20×4 and 4×16 integers with a scale of 2 bytes for each of 4 rows, and one for the 20 short rows; the bias.
    assert [row.bytes, kept.bytes] == [80 + 2 + 64 + 8 + 40, 100 + 20]
    text = shown(plan_table(plan, 2500, plan.network_bytes))
    assert "svd in 8 bits at 0.3 of the bytes of the network" in text
    assert re.search(r"svd 4, chain +│ +8 │ +1,360 │ +194 │", text)
    assert re.search(r"dense: final layer +│ +4 │ +800 │ +120 │", text)
    assert re.search(r"layers in budget +1,360 → +194 bytes", text)
    assert re.search(rf"whole network +2,500 → +{2500 - 1166 - 680} bytes", text)
    assert re.search(r"whole network +600 → +424 parameters", text)
    first, second, total, network = str(plan).splitlines()
    assert first == "a Linear 20×16: svd 4 in 8 bits, chain, 1,360 → 194 bytes"
    assert second == "b Linear 10×20: dense in 4 bits, 800 → 120 bytes"
    assert (total, network) == ("layers in budget: 340 → 164 parameters", "network: 2,500 → 654 bytes")


def test_the_table_of_a_plan_of_float32_factors_counts_parameters():
    row = LayerPlan("a", "Linear", (20, 16), 340, 4 * 36 + 20, resolve("svd"), (4,), path="chain")
    plan = Plan(resolve("svd"), 0.5, "flat", "layers", "global", (row,), 600)
    text = shown(plan_table(plan, 2500, 1796))
    assert "svd at rate 0.5 of the tensorized layers" in text
    assert re.search(r"svd 4, chain +│ +340 │ +164 │", text)
    assert "bits" not in text
    assert re.search(r"weights +2,500 → +1,796 bytes", text)
    assert "bits" not in shown(rates_table({0.5: plan}, {}))


def test_the_title_of_a_plan_names_a_width_below_32_bits_only():
    row = LayerPlan("a", "Linear", (20, 16), 320, 144, resolve("svd"), (4,))
    plan = Plan(resolve("svd"), 0.5, "flat", "layers", "global", (row,), 600, "parameters", "bytes", 2400)
    text = shown(plan_table(plan, 2400, plan.network_bytes))
    assert "Plan: svd at 0.5 of the bytes of the tensorized layers, global" in text
    assert re.search(r"svd 4 +│ +32 │ +1,280 │ +576 │", text)


def test_the_table_of_rates_counts_bytes_where_the_budget_does():
    layers = [
        LayerPlan(name, "Linear", (20, 16), 320, 320, DENSE, (), bits=bits) for name, bits in (("a", 8), ("b", 4))
    ]
    plan = Plan(DENSE, 0.4, "flat", "network", "global", tuple(layers), 700, "parameters", "bytes", 2800)
    text = shown(rates_table({0.4: plan, 0.001: InfeasibleRateError("no", 0.01)}, {}))
    assert re.search(r"│ +0.4 │ +0.2857 │ +560 │ +800 │ +4 to 8 │ +│ 2 dense", text)
    assert re.search(r"│ +0.001 │( +│){5} cannot be met: at least 0.01", text)


def test_the_bytes_of_a_plan_are_those_of_the_network(cli, tmp_path):
    code, out, err = cli(*TINY, "phase=[plan,decompose]", "method=cp", "size=0.2")
    assert (code, err) == (0, "")
    before, after = re.findall(r"whole network +([\d,]+) → +([\d,]+) bytes", out)[0]
    assert out.count(f"→ {after:>12} bytes") == 2, "expected and reached"
    result = json.loads((tmp_path / "outputs/synthetic/resnet8/cp-size0.2/seed0/result.json").read_text())
    assert [f"{result['bytes'][side]:,}" for side in ("before", "after")] == [before, after]
    assert f"{before} → {after} bytes; {result['bytes']['file']:,} bytes in" in out
    assert (result["rate_unit"], result["rate_scope"]) == ("bytes", "network")


def test_what_is_only_rounded_is_planned_once(cli):
    code, out, err = cli(*TINY, "phase=plan", "method=dense", "bits=4")
    assert (code, err) == (0, "")
    assert "whole kernels in 4 bits" in out
    assert "Plan: dense in 4 bits\n" in re.sub(" +\n", "\n", out)
    (rate,) = re.findall(r"│ +1 │ +(0\.\d+) │ .* (0\.\d+) │ 6 dense", out)
    assert 0.12 < float(rate[0]) < 0.13
    assert 0.01 < float(rate[1]) < 0.3, "rounding is expected to change the outputs"
