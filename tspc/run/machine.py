"""The device of a run, and the precision of its training."""

from __future__ import annotations

import torch

from tspc.errors import ConfigError
from tspc.run.config import Config
from tspc.training import Hardware


def hardware(config: Config, device: torch.device) -> Hardware:
    """The device and the precision of training; `auto` takes bfloat16 on GPUs that have it, float32 elsewhere."""
    if config.precision == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(device, torch.bfloat16 if has_bfloat16 else None, config.compile)
    return Hardware(device, None if config.precision == "float32" else getattr(torch, config.precision), config.compile)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError if it is absent."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # a device that holds no values, such as meta, gives none back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"device={name} cannot be used here ({reason}); use device=auto or cpu"]) from error
    return device
