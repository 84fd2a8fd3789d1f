"""Random small networks keep the contract; see `tests.random_networks` for what they are, `tests.contract` for it."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.contract import Refused, keeps_the_contract
from tests.random_networks import networks
from tests.random_uses import USES

COUNT = int(os.environ.get("TSPC_RANDOM_NETWORKS", "50"))
SEED = os.environ.get("TSPC_RANDOM_SEED")
"""Another number draws other networks; without one they are the same in every run."""


@pytest.mark.slow
def test_random_networks_keep_the_contract():
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=COUNT,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # the networks are small as they are, and to make them smaller takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), USES)
    def check(network, use):
        with tempfile.TemporaryDirectory() as folder:
            try:
                keeps_the_contract(network, use, Path(folder))
            except Refused as refused:
                outcomes[str(refused)] += 1
            else:
                outcomes["kept"] += 1

    (check if SEED is None else seed(int(SEED))(check))()
    assert outcomes["kept"] > 0.75 * outcomes.total(), outcomes
