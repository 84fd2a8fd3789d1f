"""The smallest feasible rate that an error names works itself, whatever the sizes."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import TINY
from tspc.compression.outline import _whole_share, outline
from tspc.compression.planning import plan
from tspc.compression.settings import PlanSettings
from tspc.decompositions import METHODS
from tspc.errors import ConfigError, InfeasibleRateError


def test_a_rate_allows_what_stays_within_it_when_divided():
    assert _whole_share(0.29, 100) == 29, "0.29 · 100 is 28.999… in binary"
    for base in range(1, 300):
        for least in range(1, base + 1):
            rate = -(-least * 10_000 // base) / 10_000
            assert _whole_share(least / base, base) == least
            assert least <= _whole_share(rate, base) <= rate * base + 1e-9


@given(
    widths=st.lists(st.integers(1, 70), min_size=3, max_size=6),
    method=st.sampled_from(sorted(METHODS)),
    scope=st.sampled_from(["layers", "network"]),
    multiple=st.integers(1, 4),
    allocation=st.sampled_from(["uniform", "global"]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_rate_that_an_error_names_can_be_met(widths, method, scope, multiple, allocation):
    model = nn.Sequential(*(nn.Linear(a, b, bias=b % 2 == 0) for a, b in pairwise(widths)))
    options = {"rate_scope": scope, "rank_multiple": multiple}
    try:
        sketch = outline(model, PlanSettings.of(method, **options))
    except ConfigError:
        return  # nothing to tensorize
    with pytest.raises(InfeasibleRateError, match="smallest feasible rate") as caught:
        sketch.budget(1e-9)
    named = float(re.findall(r"network is ([\d.]+)", str(caught.value))[0])
    assert named == caught.value.smallest
    small = allocation if max(widths) < 24 else "uniform"  # curves of large kernels take their time
    made = plan(model, method, named, allocation=small, **options)
    assert made.rate_reached <= named
    assert made.tensorized


@pytest.mark.parametrize("scope", ["layers", "network"])
def test_the_commands_message_names_a_rate_that_works(cli, scope):
    options = (*TINY, "phase=plan", "pretrained=random", "method=cp", f"rate_scope={scope}", "allocation=uniform")
    code, _, err = cli(*options, "rate=0.00001")
    assert code == 1
    named = re.findall(r"the smallest feasible rate for this method and network is\s+([\d.]+)", err)[0]
    code, _, err = cli(*options, f"rate={named}")
    assert code == 0, err
