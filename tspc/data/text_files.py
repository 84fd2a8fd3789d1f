"""Reads texts from plain files: tables (tsv, csv, jsonl), lines of a text file, folders of text files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspc.data.text_spec import TextSpec
from tspc.errors import DataError, shortened, some

TABLES = (".tsv", ".csv", ".jsonl")
NAMES = {"train": ("train",), "test": ("test", "val", "validation"), "held_out": ("held_out",)}
"""For each split the names of its file or folder, without the ending; the first one that is there counts."""
PAIR = "text_pair"
"""The column of a second text, if the settings name none."""
LABELLED = ("text_classification", "regression")
"""The tasks whose texts have labels."""


@dataclass(frozen=True)
class Texts:
    """The texts of a split, and of a task with labels a label each, as they were written. `where` names their file."""

    where: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[str] | None = None


def read_split(folder: Path, split: str, spec: TextSpec) -> Texts | None:
    """A split's texts, from the file or folder that is there; None if there is none.

    Raises DataError for a file that cannot be read, has no rows or lacks a column, and for two files of one split.
    """
    endings = TABLES if spec.task in LABELLED else (*TABLES, ".txt")
    path = next(
        filter(None, (_one_of(folder, stem, endings, spec.task != "regression") for stem in NAMES[split])), None
    )
    if path is None:
        return None
    if path.is_dir():
        texts = _of_folder(path, has_labels=spec.task in LABELLED)
    elif path.suffix == ".txt":
        whole = spec.task == "language_modelling"
        content = _content(path)
        lines = [content] if whole else [line.strip() for line in content.split("\n")]
        texts = Texts(str(path), [line for line in lines if line.strip()])
    else:
        texts = of_rows(_rows(path), str(path), spec)
    if not texts.texts:
        raise DataError(f"{path}: there is no text in it")
    return texts


def _one_of(folder: Path, stem: str, endings: Sequence[str], may_be_folder: bool) -> Path | None:
    """The file or folder of this name. Raises DataError if there are two."""
    found = [path for path in (folder / f"{stem}{ending}" for ending in endings) if path.is_file()]
    found += [folder / stem] if may_be_folder and (folder / stem).is_dir() else []
    if len(found) > 1:
        raise DataError(f"data_dir={folder}: {' and '.join(path.name for path in found)} are there; leave one of them")
    return found[0] if found else None


def of_rows(rows: Iterable[Mapping[str, Any]], where: str, spec: TextSpec) -> Texts:
    """The columns that the task needs. Raises DataError if one is missing, or a row has no label."""
    texts: list[str] = []
    pairs: list[str] | None = [] if spec.text_pair is not None else None
    labels: list[str] | None = [] if spec.task in LABELLED else None
    for number, row in enumerate(rows, 1):
        if number == 1 and spec.text_pair is None and PAIR in row and spec.task in LABELLED:
            pairs = []
        if labels is None and isinstance(row.get(spec.text), str) and not row[spec.text].strip():
            continue  # as an empty line of a text file
        texts.append(_cell(row, "text", spec.text, where, number))
        if pairs is not None:
            pairs.append(_cell(row, "text_pair", spec.text_pair or PAIR, where, number))
        if labels is not None:
            labels.append(_cell(row, "label", spec.label, where, number))
    return Texts(where, texts, pairs, labels)


def _cell(row: Mapping[str, Any], key: str, column: str, where: str, number: int) -> str:
    if column not in row:
        known = [name for name in row if isinstance(name, str)]
        named = f"its columns are {some(map(shortened, known))}; name one: dataset.{key}=COLUMN"
        raise DataError(f"{where} has no column {column}; {named}")
    value = row[column]
    if isinstance(value, list | Mapping):
        raise DataError(
            f"{where}: row {number} has {type(value).__name__} as its {column}; expected a text or a number"
        )
    is_missing = value is None or value != value  # a table of another library marks a gap by a number that is none
    text = "" if is_missing else str(value).strip()
    if is_missing or not (text or key == PAIR):  # the second text of a pair may be empty
        raise DataError(f"{where}: row {number} has no {column}; fill it in, or remove the row")
    return text


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a table, each with its columns by name."""
    content = _content(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _object(line, f"{path}: line {number}")
        return
    if path.suffix == ".tsv":  # nothing is quoted there: texts hold single quotes
        lines = [line.split("\t") for line in content.split("\n") if line.strip()]
    else:
        lines = _comma_separated(content, path)
    head = [name.strip() for name in lines[0]] if lines else []
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(head):
            raise DataError(f"{path}: row {number} has {len(line)} columns, the first line names {len(head)}")
        yield dict(zip(head, line, strict=True))


def _comma_separated(content: str, path: Path) -> list[list[str]]:
    usual = csv.field_size_limit(2**31 - 1)  # a text may be longer than the usual limit
    try:
        return [line for line in csv.reader(io.StringIO(content), strict=True) if line]
    except csv.Error as error:
        raise DataError(f"{path}: not a table of comma-separated values ({error})") from error
    finally:
        csv.field_size_limit(usual)


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({shortened(error)})") from error
    if not isinstance(found, dict):
        raise DataError(f'{where} holds {type(found).__name__}; expected an object, as in {{"text": "…"}}')
    return found


def _of_folder(folder: Path, has_labels: bool) -> Texts:
    """Every .txt file is a text; with labels they lie in a folder for each class."""
    places = sorted(path for path in folder.iterdir() if path.is_dir()) if has_labels else [folder]
    found = [(path, place.name) for place in places for path in sorted(place.glob("*.txt"))]
    if not found:
        inside = "folders of classes with .txt files in them" if has_labels else ".txt files"
        raise DataError(f"{folder}: expected {inside}")
    texts = [_content(path) for path, _ in found]
    empty = [str(path) for (path, _), text in zip(found, texts, strict=True) if not text.strip()]
    if empty:
        raise DataError(f"{some(empty)}: there is no text in it; remove the file")
    return Texts(str(folder), texts, labels=[label for _, label in found] if has_labels else None)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is no UTF-8; convert the file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
