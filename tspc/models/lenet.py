"""LeNet-5 (LeCun et al., Proc. IEEE 1998) with ReLU and max pooling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tspc.errors import ConfigError


class LeNet5(nn.Module):
    """Two 5×5 convolutions and three dense layers, for square images of `image_size` pixels (12 or more)."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        size = (image_size // 2 - 4) // 2
        if size < 1:
            raise ConfigError([f"lenet5 needs images of at least 12×12 pixels, the data set has {image_size}"])
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * size * size, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))
