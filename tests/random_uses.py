"""Ways to use the library on a network, for property tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from tests.random_networks import Network, kinds, mostly
from tspc.calibration.samples import Calibration
from tspc.decompositions import names

CALLERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": contextlib.nullcontext,
    "without gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
}
"""What the caller's code may be inside of."""
SHARES = (("global", "flat"), ("uniform", "flat"), ("uniform", "linear_inc"), ("uniform", "linear_dec"))
CALIBRATIONS = ("weights alone", "images", "batches", "batches with labels")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Use:
    """One way to use the library on a network."""

    method: str
    rate: float
    shares: tuple[str, str]
    """The allocation, and the decay that may go with it."""
    rate_scope: str
    rank_multiple: int
    objective: str
    calibration: str
    settings: Calibration
    caller: str
    training: bool
    exports: bool
    bits: str | None = None

    def samples(self, network: Network) -> Any:
        images = network.inputs(self.settings.samples, seed=1)
        batches = images.split(5)
        given = {
            "images": images,
            "batches": batches,
            "batches with labels": [(batch, torch.zeros(len(batch))) for batch in batches],
        }
        return given.get(self.calibration)

    @property
    def plan_options(self) -> dict[str, Any]:
        names = ("method", "rate", "rate_scope", "rank_multiple", "objective")
        allocation, decay = self.shares
        fixed = {"allocation": allocation, "rate_decay": decay, "keep_first": False, "keep_last": False}
        bits = self.bits or ("8" if self.method == "dense" else None)
        return {name: getattr(self, name) for name in names} | fixed | {"bits": bits}


USES = st.builds(
    Use,
    method=kinds(names()),
    rate=st.sampled_from((0.5, 0.3, 0.8, 0.1, 1.0)),
    shares=mostly(SHARES),
    rate_scope=mostly(("layers", "network")),
    rank_multiple=mostly((1, 4)),
    objective=mostly(("parameters", "macs")),
    calibration=kinds(CALIBRATIONS),
    settings=st.builds(
        Calibration,
        samples=st.sampled_from((16, 11, 1)),
        batch_size=st.sampled_from((8, 3)),
        sensitivity=st.booleans(),
        compensate=st.booleans(),
        batch_norm=kinds(("auto", "keep", "recalibrate")),
        memory=st.sampled_from((256, 0)),
    ),
    caller=mostly(tuple(CALLERS)),
    training=st.booleans(),
    exports=st.sampled_from((False,) * 19 + (True,)),
    bits=mostly((None, "8", "4")),
)
