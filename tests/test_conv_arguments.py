"""Every argument of a convolution × every method and path, against the convolution with the rebuilt kernel."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.methods import FAMILIES, TABLE
from tspc.decompositions import METHODS
from tspc.layers.chains import paths_of
from tspc.layers.convolutions import Form
from tspc.layers.dense import kernel_shape
from tspc.layers.forms import untrained

KERNELS = ((1, 1), (3, 3), (1, 3), (4, 2))
STRIDES = (1, 2, (2, 1))
PADDINGS = (0, (1, 2), "same")
DILATIONS = (1, (1, 2))
GROUPS = (1, 2)
COVERED = (
    *((1, 0, 1, 1), (2, 0, (1, 2), 2), ((2, 1), 0, 1, 2), (1, (1, 2), (1, 2), 2), (2, (1, 2), 1, 1)),
    *(((2, 1), (1, 2), (1, 2), 1), (1, "same", 1, 2), (1, "same", (1, 2), 1), (2, (1, 2), (1, 2), 2)),
)
"""Strides, paddings, dilations and groups: each two values of two of them that PyTorch takes together are here."""
each_method_and_mode = pytest.mark.parametrize(
    ("name", "mode"), [*((name, "zeros") for name in METHODS), *product(FAMILIES, ("reflect", "replicate", "circular"))]
)


def expected(layer: nn.Conv2d | nn.Conv1d, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What PyTorch's own layer answers with another weight."""
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))


def random_(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))


def test_each_pair_of_arguments_is_covered():
    values = (STRIDES, PADDINGS, DILATIONS, GROUPS)
    for (i, some), (j, others) in combinations(enumerate(values), 2):
        wanted = {(a, b) for a, b in product(some, others) if "same" not in (a, b) or (i, j) != (0, 1) or a == 1}
        assert {(case[i], case[j]) for case in COVERED} == wanted


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@each_method_and_mode
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_path_equals_the_rebuilt_convolution(name, kernel, mode):
    x = torch.randn(2, 8, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tried = set()
    for stride, padding, dilation, groups in COVERED:
        layer = nn.Conv2d(8, 6, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
        method = METHODS[name]().for_shape(kernel_shape(layer))
        shape = kernel_shape(layer)
        # Two terms of rtt and rcp share the positions of a kernel that has more.
        rank = tuple(min(2, top) for top in method.max_rank(shape))
        rank = (1, *rank[1:]) if name == "rtr" else rank  # its terms are the products of two bonds
        small = untrained(layer, method, rank)
        random_(small)
        weight = small.weight.detach()
        wanted = expected(layer, weight, small.bias, x)
        for path in paths_of(method, shape, rank, groups):
            small.path = path
            tried.add(path)
            for training in (True, False):
                answer = small.train(training)(x)
                torch.testing.assert_close(answer, wanted, rtol=1e-10, atol=1e-10)
        if mode == "zeros" and padding != "same":
            torch.testing.assert_close(
                wanted, F.conv2d(x, weight, small.bias, stride, padding, dilation, groups), rtol=1e-10, atol=1e-10
            )
    assert len(tried) == TABLE[name].paths[kernel != (1, 1)]


@each_method_and_mode
def test_one_dimension(name, mode):
    x = torch.randn(2, 8, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size, stride, padding, dilation, groups in product((1, 3, 4), (1, 2), (0, 2), (1, 2), GROUPS):
        layer = nn.Conv1d(8, 6, size, stride, padding, dilation, groups, padding_mode=mode).double()
        shape = kernel_shape(layer)
        method = METHODS[name]().for_shape(shape)
        rank = tuple(min(2, top) for top in method.max_rank(shape))
        small = untrained(layer, method, rank)
        random_(small)
        assert small.weight.shape == layer.weight.shape
        wanted = expected(layer, small.weight.detach(), small.bias, x)
        for path in paths_of(method, shape, rank, groups):
            small.path = path
            torch.testing.assert_close(small(x), wanted, rtol=1e-10, atol=1e-10)
        assert Form.of(layer).kind == small.kind
