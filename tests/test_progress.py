"""What is shown during phase 0: nothing by default; if asked for, a bar that counts all of the work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tspc
from tspc.calibration.samples import Calibration, Samples
from tspc.compression.apply import apply_
from tspc.phases.context import Context
from tspc.system.tally import Tally, counting
from tspc.terminal.display import Display

Shown = list[tuple[float, float, str]]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)).eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def watched(shown: Shown) -> Tally:
    return Tally(show=lambda *piece: shown.append(piece))


def test_a_bar_is_shown_only_on_request(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    seen: list[str] = []
    first = tspc.compress(model, "svd", 0.5, on_layer=seen.append, keep_last=False)
    assert capsys.readouterr().out == ""
    second = tspc.compress(model, "svd", 0.5, progress=True, keep_last=False)
    assert "compress" in capsys.readouterr().out
    assert seen.count("2") == 2
    x = torch.randn(3, 8)
    assert torch.equal(first(x), second(x))


def test_a_total_has_the_pieces_that_came():
    shown: Shown = []
    tally = watched(shown)
    with tally.expecting(3):
        tally.add("a")
    with tally.expecting(1):
        tally.add("b")
        tally.add("c")
    assert (tally.done, tally.total) == (3, 3)
    assert shown == [(1, 3, "a"), (2, 2, "b"), (3, 3, "c")]


@pytest.mark.parametrize("batch_norm", ["keep", "recalibrate", "auto"])
def test_every_batch_that_is_read_or_used_counts(batch_norm):
    shown: Shown = []
    tally, model = watched(shown), network()
    settings = Calibration(batch_size=8, samples=40, batch_norm=batch_norm)
    with Samples(images(20), settings, tally=tally) as samples:
        assert [(done, name) for done, _, name in shown] == [
            *((1, "8 inputs read"), (2, "16 inputs read"), (3, "20 inputs read"))
        ]
        assert tally.total == 3, "there were fewer images than the settings allow"
        plan = tspc.plan(model, "svd", 0.5, calibration=samples, keep_first=False)
        assert [name for _, _, name in shown[3:]] == ["how much each layer matters"] * 3
        shown.clear()
        other: Shown = []
        with counting(samples, watched(other)):
            apply_(model, plan, samples)
        assert not shown, "inside the context the work is another tally's"
        passes = {"keep": 0, "recalibrate": 3, "auto": 3 + 3 * 3}[batch_norm]
        assert [name for *_, name in other] == ["batch norms"] * passes
        assert [total for _, total, _ in other] == [passes] * passes, "all passes are expected from the start"
        assert samples.tally is tally


def test_the_librarys_bar_ends_full_and_counts_the_images_before_the_layers(monkeypatch):
    pieces: Shown = []
    add = Tally.add

    def noted(self: Tally, name: str, size: float = 1) -> None:
        add(self, name, size)
        pieces.append((self.done, self.total, name))

    monkeypatch.setattr(Tally, "add", noted)
    told: list[str] = []
    options = {"calibration": images(16), "settings": Calibration(batch_size=8), "keep_first": False}
    tspc.compress(network(), "svd", 0.5, on_layer=told.append, **options)
    names = list(dict.fromkeys(name for *_, name in pieces))
    assert names == ["8 inputs read", "16 inputs read", "how much each layer matters", "0", "3", "5", "batch norms"]
    assert pieces[-1][0] == pytest.approx(pieces[-1][1]), "nothing is left"
    assert told == ["0", "3", "0", "3", "5"], "`on_layer` gets names of layers, and nothing else"


def test_the_commands_bar_shows_the_share_of_the_work(context: Context):
    advanced: list[tuple[float, str]] = []

    class Noted(Display):
        def bar(self, label, total):
            made = super().bar(label, total)
            advance = made.advance
            made.advance = lambda *given: (advanced.append(given), advance(*given))  # type: ignore[method-assign]
            return made

    object.__setattr__(context, "display", Noted(is_silent=True))
    with context.tally("plan", "2 layers", 3) as tally, tally.expecting(2):
        for name, size in (("first", 1), ("second", 1), ("0", 2), ("1", 1)):
            tally.add(name, size)
    assert advanced == [(20, "first"), (40, "second"), (80, "0"), (100, "1")]


def test_the_live_view_shows_the_time_left_during_any_piece():
    from tests.test_display import terminal, written

    console = terminal(100, color_system=None)
    display = Display(console)
    with display.checklist(["decompose"]), display.bar("decompose 4 layers", 100) as bar:
        bar.advance(12.4, "how much each layer matters")
        console.print(display._checklist)
    assert "12/100" in written(console)
    assert "s left" in written(console)
