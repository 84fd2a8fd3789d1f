"""What follows a network on its way (`torch.jit`, `torch.fx`, torchvision's extractor) follows a compressed one too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from tests.methods import FAMILIES
from tests.nets import images, small_net
from tspc.layers.forms import tensorized_layers

each_family = pytest.mark.parametrize("name", FAMILIES)


def on_path(name: str, path: str) -> nn.Module:
    """A compressed network whose layers take the path, where they have it."""
    small = small_net(name)
    for layer in tensorized_layers(small).values():
        layer.path = path if path in layer.paths else layer.path
    return small


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@each_family
def test_a_jit_trace_is_one_graph_under_every_mode(name, context):
    small = small_net(name)
    with context():
        traced = torch.jit.trace(small, images())
    for network in (traced, torch.jit.freeze(traced)):
        torch.testing.assert_close(network(images(3)), small(images(3)))


@each_family
def test_a_graph_of_fx_has_a_node_for_every_layer(name):
    small, x = on_path(name, "chain"), images()
    graph = torch.fx.symbolic_trace(small)
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert set(tensorized_layers(small)) <= called
    with torch.no_grad():
        assert torch.equal(graph(x), small(x))
    graph.train()(x).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())


@each_family
def test_the_feature_extractor_takes_the_names_of_the_dense_layers(name):
    small, x = small_net(name), images()
    found = create_feature_extractor(small, ["wide", "hidden"])(x)
    with torch.no_grad():
        torch.testing.assert_close(found["wide"], small.wide(torch.relu(small.norm0(small.stem(x)))))
    assert found["hidden"].shape == (2, 48)


def test_hooks_act_once_in_a_graph_of_fx():
    small, x = small_net("tt"), images()
    small.wide.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(small)(x), small(x))
