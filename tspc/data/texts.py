"""Data sets of texts for a task: from files in a folder, or from Hugging Face's library of data sets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tspc.data.base import existing
from tspc.data.classes import classes_of, numbered
from tspc.data.collating import IGNORED, Example
from tspc.data.examples import Examples, Split, add_to
from tspc.data.text_files import Texts, of_rows, read_split
from tspc.data.text_spec import BYTES, TextSpec
from tspc.data.tokenizers import Columns, Tokenizer, tokenizer_of
from tspc.errors import DataError, shortened, some
from tspc.system import extras

WANTED = {
    "text_classification": "train.tsv (or .csv, .jsonl, with the columns text and label), or train/CLASS/*.txt",
    "regression": "train.tsv (or .csv, .jsonl, with the columns text and label)",
    "sentence_embeddings": "train.txt (a text on each line)",
    "language_modelling": "train.txt",
}
"""For each task the files that it reads; the same again for `test`."""

TOKENS = 2048
"""The number of tokens that are judged at once in language modelling: for each there is a score of every token."""


class Rows(Sequence[Example]):
    """Texts as token numbers, all of them one after the other in memory, with their targets.

    A target is a number for each text, or with `of_tokens` one for each token.
    """

    def __init__(self, columns: dict[str, Tensor], sizes: Tensor, targets: Tensor, of_tokens: bool = False) -> None:
        self._columns, self._targets, self._of_tokens = columns, targets, of_tokens
        self._ends = sizes.cumsum(0).tolist()
        self.largest_token = int(columns["input_ids"].max())
        found = hashlib.sha256()
        for name, tensor in [*columns.items(), ("sizes", sizes), ("targets", targets)]:
            add_to(found, name, tensor)
        self.digest = found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: Any) -> Any:
        start, end = self._ends[place - 1] if place else 0, self._ends[place]
        inputs = {name: column[start:end].long() for name, column in self._columns.items()}
        inputs["attention_mask"] = torch.ones(end - start, dtype=torch.long)
        return inputs, self._targets[start:end].long() if self._of_tokens else self._targets[place]


class Masked(Sequence[Example]):
    """Texts with hidden tokens, which are the targets; all other positions do not count.

    Of the `share` that is drawn, eight in ten become the mark `mask`, one a random token of `size`, and one stays
    (Devlin et al., BERT, arXiv:1810.04805). At least one token is drawn, from PyTorch's generator.
    """

    def __init__(self, rows: Rows, share: float, mask: int, size: int) -> None:
        self._rows, self._share, self._mask, self._size = rows, share, mask, size
        self.digest, self.largest_token = f"{rows.digest}-{share:g}-{mask}", max(mask, rows.largest_token)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        inputs, _ = self._rows[place]
        tokens = inputs["input_ids"]
        order = torch.rand(len(tokens))
        drawn = (order < self._share) | (order == order.min())
        kind, other = torch.rand(len(tokens)), torch.randint(self._size, tokens.shape)
        hidden = torch.where(kind < 0.8, self._mask, torch.where(kind < 0.9, other, tokens))
        return inputs | {"input_ids": torch.where(drawn, hidden, tokens)}, torch.where(drawn, tokens, IGNORED)


def text_data(spec: TextSpec, data_dir: Path | None, download: bool) -> Examples:
    """The texts in a folder's files. Raises DataError for missing or damaged files, and for wrong labels."""
    if data_dir is None:
        raise DataError(f"dataset={spec.name} needs data_dir=FOLDER with {WANTED[spec.task]}, and the same for test")
    root = existing(data_dir)
    assert root is not None
    found = {split: read_split(root, split, spec) for split in ("train", "test", "held_out")}
    missing = next((split for split in ("train", "test") if found[split] is None), None)
    if missing:
        raise DataError(f"data_dir={root}: expected {WANTED[spec.task].replace('train', missing)}")
    return encoded(spec, {split: texts for split, texts in found.items() if texts is not None})


def library_data(spec: TextSpec, data_dir: Path | None, download: bool) -> Examples:
    """The texts of a data set that the library `datasets` reads: from the hub, or from a folder of files.

    Raises DataError if it cannot be read or lacks a split, ConfigError if the library is missing.
    """
    extras.require("datasets", "dataset=datasets")
    import datasets  # pyright: ignore[reportMissingImports]

    place = spec.path or (None if data_dir is None else str(existing(data_dir)))
    if place is None:
        raise DataError("dataset=datasets needs dataset.path=NAME of a data set on the hub, or data_dir=FOLDER")
    named = f"dataset.path={place}" if spec.path else f"data_dir={place}"
    mode = datasets.DownloadConfig(local_files_only=not download)
    try:
        if (Path(place) / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(place)
        else:
            loaded = datasets.load_dataset(place, spec.subset, download_config=mode)
    except Exception as error:  # the library raises errors of many packages
        raise DataError(f"{named}: it cannot be read ({shortened(error, 300)})") from error
    splits = {"train": spec.train_split, "test": spec.test_split}
    absent = [name for name in splits.values() if name not in loaded]
    if absent:
        known = f"it has {some(map(str, loaded))}; name them: dataset.train_split=, dataset.test_split="
        raise DataError(f"{named} has no split {absent[0]}; {known}")
    return encoded(spec, {split: of_rows(loaded[name], f"{named} {name}", spec) for split, name in splits.items()})


def encoded(spec: TextSpec, splits: dict[str, Texts]) -> Examples:
    """The data set of the texts. Raises DataError for labels that do not suit the task, and for an empty split."""
    for texts in splits.values():
        if not texts.texts:
            raise DataError(f"{texts.where}: there is no text in it")
    tokenizer = tokenizer_of(spec.tokenizer or BYTES)
    fills = {"input_ids": tokenizer.padding}
    if spec.task == "language_modelling":
        blocks: dict[str, Split] = {split: _blocks(texts, tokenizer, spec) for split, texts in splits.items()}
        return Examples(spec.name, tokenizer.size, blocks, fills, max(1, TOKENS // spec.length))
    classes = classes_of(spec, splits) if spec.task == "text_classification" else []
    rows = {}
    for split, texts in splits.items():
        columns = tokenizer.encoded(texts.texts, texts.pairs, spec.length)
        rows[split] = _rows(columns, _targets(texts, classes, spec))
    return Examples(spec.name, max(1, len(classes)), rows, fills, classes=classes)


def _rows(columns: Columns, targets: Tensor) -> Rows:
    sizes = torch.tensor([len(row) for row in columns["input_ids"]])
    flat = {
        name: torch.tensor([number for row in rows for number in row], dtype=torch.int32)
        for name, rows in columns.items()
    }
    return Rows(flat, sizes, targets)


def _blocks(texts: Texts, tokenizer: Tokenizer, spec: TextSpec) -> Split:
    """Blocks of nearly one length; the target of a token is the one after it, or some tokens are hidden.

    Every token but the first is a target once, if none are hidden. Blocks of nearly one length weigh all tokens alike
    in a mean over them.
    """
    tokens = torch.tensor(tokenizer.stream(texts.texts), dtype=torch.int32)
    count = len(tokens) - 1
    if count < 1:
        raise DataError(f"{texts.where}: there are not two tokens in it")
    number = math.ceil(count / spec.length)
    sizes = torch.tensor([count // number + (place < count % number) for place in range(number)])
    rows = Rows({"input_ids": tokens[:-1]}, sizes, tokens[1:], of_tokens=True)
    if not spec.masked:
        return rows
    if tokenizer.mask is None:
        raise DataError(
            f"dataset.masked={spec.masked:g}: the tokenizer {spec.tokenizer} has no mark for a hidden token"
        )
    return Masked(rows, spec.masked, tokenizer.mask, tokenizer.size)


def _targets(texts: Texts, classes: list[str], spec: TextSpec) -> Tensor:
    if texts.labels is None:  # nothing is compared with them
        return torch.zeros(len(texts.texts), dtype=torch.long)
    if spec.task == "regression":
        return torch.tensor([_number(label, texts.where, row) for row, label in enumerate(texts.labels, 1)])
    return torch.tensor(numbered(texts.labels, classes, texts.where, spec.classes is not None))


def _number(label: str, where: str, row: int) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{where}: the label {shortened(label)!r} in row {row} is no number; task=regression needs numbers"
        )
    return value
