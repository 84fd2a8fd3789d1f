"""ResNets for small images (He et al., CVPR 2016, section 4.2) and their pre-activation form (ECCV 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CIFAR_RESNETS = tuple(f"resnet{depth}{version}" for version in ("", "_v2") for depth in (8, 20, 32, 44, 56))


def _conv3x3(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut subsamples and pads channels with zeros (option A, no parameters)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(n_in, n_out, stride), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = _conv3x3(n_out, n_out), nn.BatchNorm2d(n_out)
        self.stride, self.extra = stride, n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(x + y)


class PreactBlock(nn.Module):
    """Batch norm and ReLU before each convolution; the first block of a stage projects by a 1×1 convolution."""

    def __init__(self, n_in: int, n_out: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), _conv3x3(n_in, n_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), _conv3x3(n_out, n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class CifarResNet(nn.Module):
    """Depth 6n + 2: three stages of n blocks with 16, 32 and 64 channels. Parameters have the customary names."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, preact: bool) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = _conv3x3(in_channels, 16)
        self.bn1 = None if preact else nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1, preact)
        self.layer2 = self._stage(16, 32, n, 2, preact)
        self.layer3 = self._stage(32, 64, n, 2, preact)
        self.bn_final = nn.BatchNorm2d(64) if preact else None
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(n_in: int, n_out: int, count: int, stride: int, preact: bool) -> nn.Sequential:
        blocks: list[nn.Module] = []
        for i in range(count):
            before, step = (n_in, stride) if i == 0 else (n_out, 1)
            block = PreactBlock(before, n_out, step, i == 0) if preact else BasicBlock(before, n_out, step)
            blocks.append(block)
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x if self.bn1 is None else F.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = x if self.bn_final is None else F.relu(self.bn_final(x))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(name: str, num_classes: int, in_channels: int) -> CifarResNet:
    """The network called `resnet<depth>` or `resnet<depth>_v2`."""
    depth, _, version = name.removeprefix("resnet").partition("_")
    return CifarResNet(int(depth), num_classes, in_channels, preact=version == "v2")
