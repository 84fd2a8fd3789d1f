"""Small networks and data for the tests of tasks: words that tell a class, a number, or the next word."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

NETWORKS = """
import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self, out=2, is_pooled=True, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(260, width)
        block = lambda: nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(width, out)
        self.is_pooled = is_pooled

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        if self.is_pooled:
            mask = attention_mask[..., None].to(x)
            x = (x * mask).sum(1) / mask.sum(1)
        return self.head(x)


def classifier():
    return Encoder()


def number():
    return Encoder(1)


def vector():
    return Encoder(16)


def words():
    return Encoder(260, is_pooled=False)


def few_words():
    return Encoder(100, is_pooled=False)


def filled(length, seed):
    torch.manual_seed(seed)
    return [({"x": torch.randn(2 + i % 3, 8), "length": torch.tensor(2 + i % 3)}, float(i % 2)) for i in range(length)]


def data():
    return filled(64, 0), filled(20, 1)


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x, length):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.sum(1) / length[:, None])


def closeness(network, batches):
    return -sum(float((network(**x.named)[:, 0] - y).abs().sum()) for x, y in batches)


def loss(answers, targets):
    return (answers[:, 0] - targets).abs().mean()
"""
WORDS = {"good": "fine nice great happy".split(), "bad": "poor awful sad grim".split()}
NUMBERS = {"good": "1.5", "bad": "-1"}


def write(folder: Path, task: str, train: int = 96, test: int = 24) -> Path:
    """Files for a task in a new folder."""
    folder.mkdir()
    draw = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        rows = []
        for place in range(count):
            label = "good" if place % 2 else "bad"
            words = [draw.choice([*WORDS[label], "the", "a", "it"]) for _ in range(draw.randint(3, 8))]
            rows.append((" ".join([draw.choice(WORDS[label]), *words]), label))
        if task in ("text_classification", "regression"):
            shown = NUMBERS if task == "regression" else {label: label for label in WORDS}
            lines = ["text\tlabel", *(f"{text}\t{shown[label]}" for text, label in rows)]
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        else:
            (folder / f"{split}.txt").write_text("\n".join(text for text, _ in rows) + "\n")
    return folder


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "owntasks") -> str:
    """Writes the networks into a module that can be imported, and returns its name."""
    (folder / f"{name}.py").write_text(NETWORKS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name
