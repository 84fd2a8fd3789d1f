"""Networks whose speed `benchmarks.inference` measures: dense, of tspc's methods, of tensorly-torch's layers.

Weights and factors are random, for only speed counts. Batch norms are folded; tensorly-torch's layers keep them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import tspc
from tspc.compression.plan import Plan
from tspc.decompositions import METHODS
from tspc.deploy.folding import fold_batch_norms
from tspc.layers.dense import kernel_of
from tspc.layers.forms import untrained
from tspc.layers.replacing import set_module
from tspc.models import NetworkSpec

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet50": (torchvision.models.resnet50, 8, 224),
    "resnet32": (lambda: NetworkSpec("builtin", "resnet32", 10).build(), 128, 32),
    "vit_b_16": (torchvision.models.vit_b_16, 8, 224),
}
"""The network, its usual batch size and its image size."""
DENSE = "dense"
TLTORCH = {"tltorch-cp": "cp", "tltorch-tucker": "tucker", "tltorch-tt": "tt"}
WINS = 100.0
ALL = (DENSE, *METHODS, *TLTORCH)


def planned(model: nn.Module, method: str, options: argparse.Namespace, images: Tensor, runtime: str) -> Plan:
    """The ranks of every layer, and the paths for a runtime of `tspc.deploy.RUNTIMES`."""
    multiple = max(1, options.rank_multiple // 4) if method.startswith("r") else options.rank_multiple
    return tspc.plan(
        model,
        method,
        options.rate,
        allocation="uniform",
        rank_multiple=multiple,
        objective=options.objective,
        paths=options.paths,
        runtime=runtime,
        keep_first=not options.first,
        example=images[:1],
    )


@torch.no_grad()
def tensorized_(model: nn.Module, plan: Plan) -> nn.Module:
    """Random factors whose kernels have the size of usual initial ones: numbers too small would slow the processor."""
    for row in plan.tensorized:
        assert row.method is not None
        assert row.rank is not None
        dense: Any = model.get_submodule(row.name)
        layer: Any = untrained(dense, row.method, row.rank, row.path)
        for parameter in layer.parameters():
            parameter.normal_()
        kernel = kernel_of(layer)
        layer.factor_tensors()[0].mul_(kernel[0].numel() ** -0.5 / kernel.std())
        if layer.bias is not None:
            layer.bias.zero_()
        set_module(model, row.name, layer)
    return model.eval()


def factorized_(model: nn.Module, form: str, rate: float, rows: Plan) -> nn.Module:
    """tensorly-torch's layers in the place of those that tspc would tensorize."""
    tl, utils = importlib.import_module("tltorch"), importlib.import_module("tltorch.utils")
    for row in rows.budgeted:
        dense: Any = model.get_submodule(row.name)
        if isinstance(dense, nn.Linear):
            # Not `from_linear`, which would decompose random weights for hours.
            # `implementation="factorized"` wants 380 GB for a ViT.
            inputs, outputs = utils.get_tensorized_shape(
                dense.in_features, dense.out_features, order=2, min_dim=2, verbose=False
            )
            has_bias = dense.bias is not None
            layer: Any = tl.FactorizedLinear(
                inputs,
                outputs,
                bias=has_bias,
                factorization={"tt": "blocktt"}.get(form, form),
                rank=rate,
                implementation="reconstructed",
            )
            if has_bias:
                layer.bias.zero_()
        else:
            layer = tl.FactorizedConv(
                dense.in_channels,
                dense.out_channels,
                dense.kernel_size,
                order=2,
                stride=dense.stride,
                padding=dense.padding,
                bias=dense.bias is not None,
                factorization=form,
                rank=rate,
                implementation="factorized",
            )
        layer.weight.normal_(0.0, dense.weight[0].numel() ** -0.5)
        set_module(model, row.name, layer)
    return model.eval()


@torch.no_grad()
def network(method: str, options: argparse.Namespace, images: Tensor, runtime: str) -> tuple[nn.Module, str]:
    """The network of a method, planned for a runtime, and the rate that it reaches."""
    torch.manual_seed(options.seed)
    model = NETWORKS[options.network][0]().eval()
    # One class wins for every image. Else 8 bits might change the class of a random network, and the exporter would
    # leave the first and the last layer in float32.
    last: Any = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.bias[0] = WINS
    if method == DENSE:
        return fold_batch_norms(model, images[:1]), "1"
    if method in TLTORCH:
        before = sum(p.numel() for p in model.parameters())
        rows = planned(model, "svd", options, images, runtime)
        model = factorized_(model, TLTORCH[method], options.rate, rows)
        after = sum(p.numel() for p in model.parameters())
        return model, f"{(after - before + rows.dense_params) / rows.dense_params:.3f}"
    plan = planned(model, method, options, images, runtime)
    return fold_batch_norms(tensorized_(model, plan), images[:1]), f"{plan.rate_reached:.3f}"
