"""A tensorized layer equals the dense layer with the rebuilt kernel, for every argument of a convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tspc.decompositions import METHODS
from tspc.layers.forms import Chain, Contracted, tensorize

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "per axis": {"kernel_size": 3, "padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)},
    "7x7 stride 2": {"kernel_size": 7, "padding": 3, "stride": 2, "bias": False},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same even dilated": {"kernel_size": (4, 3), "padding": "same", "dilation": (2, 1)},
    "valid": {"kernel_size": (2, 3), "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "stride": (2, 1), "dilation": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "replicate"},
    "circular same": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x1 strided padded": {"kernel_size": 1, "stride": (2, 1), "padding": 1},
    "1x3": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
}

each_method = pytest.mark.parametrize("name", METHODS)


def tensorized(layer, name, share=2):
    method = METHODS[name]().for_shape(tuple(layer.weight.shape))
    shape = tuple(layer.weight.shape)
    budget = max(method.min_params(shape), layer.weight.numel() // share)
    return tensorize(layer, method, method.rank_for(shape, budget))


def with_kernel_of(layer, small):
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(small.weight)
    return dense


@each_method
@pytest.mark.parametrize("arguments", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(name, arguments):
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 10, **arguments).double()
    small = tensorized(layer, name)
    x = torch.randn(2, 12, 13, 11, dtype=torch.float64)
    expected = with_kernel_of(layer, small)(x)
    torch.testing.assert_close(small(x), expected, rtol=1e-10, atol=1e-12)


@each_method
@pytest.mark.parametrize("size", [1, 3])
def test_answers_in_the_layout_of_the_dense_layer(name, size):
    """People call `.view` on what a convolution answers."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    small = tensorized(nn.Conv2d(3, 8, size).double().eval(), name)
    for path in small.paths:
        small.path = path
        assert small(x).is_contiguous(), path


@each_method
@pytest.mark.parametrize("bias", [True, False])
def test_dense_layer_with_leading_dimensions(name, bias):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, bias=bias).double()
    small = tensorized(layer, name)
    x = torch.randn(2, 3, 30, dtype=torch.float64)
    torch.testing.assert_close(small(x), with_kernel_of(layer, small)(x), rtol=1e-10, atol=1e-12)
    assert (small.bias is None) == (not bias)


@each_method
def test_gradients_reach_every_parameter_and_the_input(name):
    layer = nn.Conv2d(8, 8, 3, padding=1)
    small = tensorized(layer, name)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    small(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in small.parameters())


def test_forms():
    layer = nn.Conv2d(8, 8, 3)
    assert isinstance(tensorized(layer, "tk"), Chain)
    assert isinstance(tensorized(layer, "rtt"), Contracted)
    depthwise = tensorized(layer, "cp")[1]
    assert depthwise.groups == depthwise.in_channels, "cp's spatial link is depthwise"
    assert all(type(link) is nn.Conv2d for link in tensorized(layer, "tt"))


@each_method
def test_deepcopy_mode_dtype_and_channels_last(name):
    layer = nn.Conv2d(8, 6, 3).eval()
    small = tensorized(layer, name)
    assert not small.training
    x = torch.randn(1, 8, 5, 5)
    twin = copy.deepcopy(small).to(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(x), small(x), rtol=1e-4, atol=1e-5)
    assert small.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert name in repr(small) or "svd" in repr(small)


def test_frozen_layers_stay_frozen():
    layer = nn.Conv2d(8, 6, 3).requires_grad_(False)
    assert not any(p.requires_grad for p in tensorized(layer, "tk").parameters())
