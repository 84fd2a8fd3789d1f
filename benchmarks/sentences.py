"""all-MiniLM-L6-v2 on sentences: how near a compressed network's vectors are to the original's, and its opponents."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tspc
from benchmarks.phase_zero import Sentences
from tspc.compression.integers import state_bytes

LENGTH = 64
"""Tokens of a sentence; shorter ones are padded, so that one exported graph takes all."""
TEST, CALIBRATION = 400, 512
PACKAGES = ("sklearn", "scipy", "numpy", "torch")

Embed = Callable[[Tensor], Tensor]
"""From token numbers (N × LENGTH) to vectors (N × 384)."""


def pairs() -> list[tuple[str, str]]:
    """First lines and bodies of the docstrings of installed packages, in a seeded random order."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SystemExit(f"the sentences are docstrings of {', '.join(PACKAGES)}; {name} is not installed")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "test" not in str(path):
                found = _pairs_of(path) | found
    titles = list(found)
    order = torch.randperm(len(titles), generator=torch.Generator().manual_seed(0)).tolist()
    return [(titles[i], found[titles[i]]) for i in order]


def _pairs_of(path: Path) -> dict[str, str]:
    found = {}
    with warnings.catch_warnings():  # of escapes in the source of others
        warnings.simplefilter("ignore")
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    for node in nodes:
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
        title, _, body = (text or "").partition("\n\n")
        title, body = " ".join(title.split()), " ".join(body.split(">>>")[0].split())
        if 30 < len(title) < 200 and len(body) > 150 and title not in body:
            found.setdefault(title, body)
    return found


@dataclass(frozen=True)
class Judge:
    """What is measured on `TEST` pairs that calibration has not seen; `reference` are the original's vectors."""

    titles: Tensor
    bodies: Tensor
    reference: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Embed, titles: Tensor, bodies: Tensor) -> Judge:
        return cls(titles, bodies, torch.cat([_vectors(model, titles), _vectors(model, bodies)]))

    @torch.no_grad()
    def __call__(self, embed: Embed) -> dict[str, float]:
        """The mean cosine to the original's vectors, recall@1 of a title's body, and Spearman of the similarities.

        The cosine is that of titles and bodies; `titles` is that of titles alone. The similarities are those between
        all titles; their ranks are compared with the original's.
        """
        titles, bodies = _vectors(embed, self.titles), _vectors(embed, self.bodies)
        recall = (titles @ bodies.T).argmax(1) == torch.arange(len(titles))
        ranks = torch.stack([_ranks(x @ x.T) for x in (titles, self.reference[: len(titles)])])
        cosines = (torch.cat([titles, bodies]) * self.reference).sum(1)
        return {
            "cosine": float(cosines.mean()),
            "titles": float(cosines[: len(titles)].mean()),
            "recall": 100 * float(recall.double().mean()),
            "spearman": float(torch.corrcoef(ranks)[0, 1]),
        }


def _vectors(embed: Embed, ids: Tensor) -> Tensor:
    return torch.cat([F.normalize(embed(part).float(), dim=1) for part in ids.split(50)])


def _ranks(similarities: Tensor) -> Tensor:
    upper = torch.triu_indices(len(similarities), len(similarities), 1)
    return similarities[upper[0], upper[1]].argsort().argsort().double()


class Data(NamedTuple):
    """Token numbers (N × LENGTH): what judges; what calibrates; all other sentences."""

    titles: Tensor
    bodies: Tensor
    calibration: Tensor
    training: Tensor


def sentences(folder: Path, seed: int) -> Data:
    """The sentences as the tokenizer in this folder gives them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")[
            "input_ids"
        ]

    found = pairs()
    test, rest = found[:TEST], found[TEST:]
    titles, bodies = tokens([title for title, _ in test]), tokens([body for _, body in test])
    shown = [text for pair in rest for text in pair]
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, others = order[:CALIBRATION], order[CALIBRATION:]
    return Data(titles, bodies, tokens([shown[i] for i in chosen]), tokens([shown[i] for i in others]))


def minilm(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Judge]:
    """The network, sentences for calibration, and the judge."""
    model = Sentences().eval()
    data = sentences(model.folder, options.seed)
    return model, data.calibration, Judge.of(model, data.titles, data.bodies)


def opponents(model: nn.Module, judge: Judge) -> dict[str, Callable[[], dict[str, Any]]]:
    """Other ways to fewer bytes, by name; each gives the same figures as our networks."""
    return {
        "ONNX Runtime, dynamic int8": lambda: _onnx_int8(model, judge, per_channel=False),
        "ONNX Runtime, dynamic int8 per channel": lambda: _onnx_int8(model, judge, per_channel=True),
        "PyTorch, dynamic int8": lambda: _torch_int8(model, judge),
    }


def _onnx_int8(model: nn.Module, judge: Judge, per_channel: bool) -> dict[str, Any]:
    """The exported network with all constants of products and look-ups in 8 bits. Bytes are those of the file."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        tspc.export(model, source, judge.titles[:4])
        started = time.monotonic()
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=per_channel)
        seconds = time.monotonic() - started
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        figures = judge(lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0]))
        return _row(figures, target.stat().st_size / state_bytes(model), seconds)


def _torch_int8(model: nn.Module, judge: Judge) -> dict[str, Any]:
    """PyTorch's dynamic quantization of the dense layers; tables of embeddings stay in float32."""
    started = time.monotonic()
    with warnings.catch_warnings():  # it tells of its successor
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        seconds = time.monotonic() - started
        file = io.BytesIO()
        torch.save(small.state_dict(), file)
        return _row(judge(small), file.tell() / state_bytes(model), seconds)


def _row(figures: dict[str, float], share: float, seconds: float) -> dict[str, Any]:
    return figures | {"share": share, "seconds": seconds, "bits": {}, "methods": []}
