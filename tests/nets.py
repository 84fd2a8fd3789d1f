"""A network with layers of several kinds, and a tensorized layer, for the tests of what runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import tspc
from tspc.decompositions import METHODS
from tspc.layers.dense import kernel_shape
from tspc.layers.forms import TensorizedLayer, tensorize


class Net(nn.Module):
    """Convolutions of several kinds, batch norms, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm0 = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.point = nn.Conv2d(32, 64, 1)
        self.norm2 = nn.BatchNorm2d(64, affine=False)
        self.hidden = nn.Linear(64, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(self.norm1(self.wide(x)))
        x = F.relu(self.norm2(self.point(x)))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


def small_net(name: str, rate: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    small = tspc.compress(Net(), name, rate, allocation="uniform")
    with torch.no_grad():
        small(torch.randn(16, 3, 12, 12))  # statistics of the batch norms
    return small.eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def a_layer(name: str = "rtt", path: str | None = None) -> TensorizedLayer:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1).eval()
    method = METHODS[name]()
    return tensorize(layer, method, method.rank_for(kernel_shape(layer), 300), path=path)


def dense_answer(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=1)
