"""Where a network lies, and in which layout."""

from __future__ import annotations

import torch
from torch import nn


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves the network, its convolutions' kernels channels last: on CPU and GPU alike their faster layout."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
