"""What the library shows while it works: nothing by default, a bar with the time left if it is asked for."""

from __future__ import annotations

import torch
from torch import nn

import tspc


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
