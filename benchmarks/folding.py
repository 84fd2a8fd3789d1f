"""Batch norms folded in networks of timm: thirty and more families, dense and compressed.

    python -m benchmarks.folding [--networks resnet18,vgg11_bn] [--report]

Random weights (seeded) and statistics of the batch norms that are random, too; small images. Each network is folded as
it is, and again after it was compressed to 0.3 of its layers' parameters (`svd`, the weights alone). The folded network
is run on other images than it was folded with, and its answers are compared with the unfolded one's. An outcome is

- `folded N of M`: the answers are equal within 1e-4 of the largest, and N of M batch norms are gone;
- `rounding`: they are not, a warning said so, and the network's own answers are as far from those in float64;
- `refused`: an error of one line says why;
- `DIFFERS`: anything else, which must not be.

What was found is kept for each network in --out, and not made again; --report prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import tspc
from benchmarks.common import machine, table
from tspc.errors import TspcError, TspcWarning
from tspc.store.files import write_json
from tspc.traversal.copying import copied
from tspc.traversal.nested import tensors_in

LIMIT = 1e-4
RATE = 0.3

NETWORKS = (
    *("resnet18", "resnetv2_50", "resnest14d", "res2net50_14w_8s", "skresnet18", "ecaresnet26t", "legacy_seresnet18"),
    *("efficientnet_lite0", "efficientnet_b0", "mobilenetv3_small_050", "mobilenetv2_050", "ghostnet_050"),
    *("repghostnet_050", "hardcorenas_a", "lcnet_050", "mnasnet_small", "tinynet_e", "regnety_002", "regnetv_040"),
    *("densenet121", "dla34", "dpn48b", "eca_vovnet39b", "cs3darknet_focus_s", "hgnet_tiny", "selecsls42"),
    *("vgg11_bn", "inception_v3", "xception41", "rexnet_100", "repvgg_a0", "hrnet_w18_small", "fasternet_t0"),
    *("efficientvit_b0", "efficientvit_m0", "levit_128s", "repvit_m0_9", "starnet_s1", "convmixer_768_32", "shvit_s1"),
    *("mobilevit_xxs", "edgenext_xx_small", "efficientformer_l1", "fastvit_t8", "visformer_tiny", "convnext_atto"),
)
SIZES = {
    "inception_v3": 96,
    "levit_128s": 224,
    "efficientvit_m0": 224,
    "efficientformer_l1": 224,
    "visformer_tiny": 224,
}
"""Pixels, where 64 are too few."""


@torch.no_grad()
def build(name: str, images: Tensor) -> nn.Module:
    """The network with batch norms that know the images, roughly: statistics and scales are then shaken."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # a head that would answer nothing
            nn.init.trunc_normal_(module.weight, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    model.eval()
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    model(images)
    for norm in norms:
        norm.eval()
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        mean.add_(0.3 * variance.sqrt() * torch.randn_like(mean))
        variance.mul_(torch.empty_like(variance).uniform_(0.7, 1.4))
        if norm.weight is not None:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(std=0.2)
    return model


@torch.no_grad()
def outcome(model: nn.Module, images: Tensor, others: Tensor) -> dict[str, Any]:
    """What became of the network when it was folded with `images`, and how far `others` are from where they were."""
    norms = _count(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", TspcWarning)
        try:
            folded = tspc.fold_batch_norms(model, images)
        except TspcError as error:
            return {"outcome": "refused", "why": str(error)}
    pairs = list(zip(tensors_in(model(others)), tensors_in(folded(others)), strict=True))
    distance = max(float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in pairs)
    why = "; ".join(str(w.message) for w in said if issubclass(w.category, TspcWarning))
    count = f"{norms - _count(folded)} of {norms}"
    if distance <= LIMIT:
        kind = "folded"
    else:
        kind = "rounding" if why and distance <= 2 * _own_rounding(model, others) else "DIFFERS"
    return {"outcome": f"{kind} {count}", "distance": distance, "why": why}


def _own_rounding(model: nn.Module, images: Tensor) -> float:
    """How far the network's answers are from those that it gives in float64."""
    pairs = zip(tensors_in(model(images)), tensors_in(copied(model).double()(images.double())), strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _count(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def examine(name: str) -> dict[str, Any]:
    """Both outcomes of a network; a crash is one, too."""
    size = SIZES.get(name, 64)
    images, others = (torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    found: dict[str, Any] = {}
    for kind in ("dense", "compressed"):
        try:
            model = build(name, images).eval()
            model = tspc.compress(model, "svd", RATE, allocation="uniform") if kind == "compressed" else model
            found[kind] = outcome(model, images, others)
        except TspcError as error:
            found[kind] = {"outcome": "refused", "why": str(error)}
        except Exception as error:  # a finding of this benchmark
            found[kind] = {"outcome": "DIFFERS", "why": f"{type(error).__name__}: {error}"}
    return found


def report(names: list[str], out: Path) -> str:
    rows: list[list[str]] = []
    totals = {"folded": 0, "rounding": 0, "refused": 0, "DIFFERS": 0}
    for path in (out / f"{name}.json" for name in names):
        found = json.loads(path.read_text()) if path.exists() else {}
        for kind, result in found.items():
            totals[result["outcome"].split()[0]] += 1
            distance = f"{result['distance']:.0e}" if "distance" in result else ""
            rows.append([path.stem, kind, result["outcome"], distance, result["why"][:200]])
    counts = ", ".join(f"{count} {kind}" for kind, count in totals.items())
    return f"{table(['network', 'kind', 'outcome', 'difference', 'said'], rows)}\n\n{counts}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--networks", default=",".join(NETWORKS))
    arguments.add_argument("--report", action="store_true", help="only print the table of what is there")
    arguments.add_argument("--out", default="outputs/folding")
    options = arguments.parse_args()
    names, out = options.networks.split(","), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = out / f"{name}.json"
        if not options.report and not path.exists():
            write_json(path, examine(name))
            print(f"{name}: {path.read_text()}", flush=True)
    print(f"\n{machine(0)}\n\n{report(names, out)}")


if __name__ == "__main__":
    main()
