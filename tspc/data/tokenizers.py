"""Text → token numbers: a tokenizer of Hugging Face's, or one that takes every byte as a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tspc.data.text_spec import BYTES
from tspc.errors import DataError, shortened, some
from tspc.system import extras

REMEDY = f"name the folder of one, or {BYTES}"
VOCABULARIES = ("tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
"""Files of a tokenizer of any kind."""
Columns = dict[str, list[list[int]]]
"""For each argument of the network the numbers of every text; `input_ids` are the tokens."""


class Tokenizer(Protocol):
    """`size` is the number of tokens. `padding` fills the end of a text. `mask` hides a token, if there is one.

    `marks` has the numbers of the marks `pad`, `bos` and `eos` (padding, begin and end) that there are.
    """

    size: int
    padding: int
    mask: int | None
    marks: dict[str, int]

    def encoded(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> Columns:
        """The texts, or pairs of texts, with the marks of their ends, cut to `length` tokens."""
        ...

    def stream(self, texts: Sequence[str]) -> list[int]:
        """The texts one after the other, each with a mark of its end where there are several."""
        ...


class ByteTokenizer:
    """A token for each byte of UTF-8, and four marks: padding 0, begin 1, end 2, hidden 3."""

    size, padding = 260, 0
    mask: int | None = 3
    _begin, _end, _first = 1, 2, 4

    def __init__(self) -> None:
        self.marks = {"pad": self.padding, "bos": self._begin, "eos": self._end}

    def encoded(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> Columns:
        rows, kinds = [], []
        for place, text in enumerate(texts):
            parts = [self._bytes(text)] + ([] if pairs is None else [self._bytes(pairs[place])])
            _cut(parts, max(0, length - 1 - len(parts)))
            rows.append([self._begin, *(token for part in parts for token in [*part, self._end])])
            kinds.append([0] * (2 + len(parts[0])) + [1] * sum(1 + len(part) for part in parts[1:]))
        return {"input_ids": rows} | ({} if pairs is None else {"token_type_ids": kinds})

    def stream(self, texts: Sequence[str]) -> list[int]:
        ends = [self._end] if len(texts) > 1 else []
        return [token for text in texts for token in [*self._bytes(text), *ends]]

    def _bytes(self, text: str) -> list[int]:
        return [self._first + byte for byte in text.encode()]


def _cut(parts: list[list[int]], length: int) -> None:
    """Takes tokens from the end of the longest part, until all together have at most `length`."""
    for part in parts:
        del part[length:]
    while sum(map(len, parts)) > length:
        max(parts, key=len).pop()


class PublishedTokenizer:
    """A tokenizer of Hugging Face's transformers, from a folder or the hub; nothing there is executed."""

    def __init__(self, name: str) -> None:
        """Raises DataError for a folder or a name without a tokenizer, ConfigError if transformers is missing."""
        if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
            raise DataError(f"dataset.tokenizer={name}: there is no such folder")
        if "/" not in name and not Path(name).is_dir():  # before the hub is asked, which takes long where there is none
            raise DataError(f"dataset.tokenizer={name}: expected a folder, a name on the hub (OWNER/NAME), or {BYTES}")
        extras.require("transformers", f"dataset.tokenizer={name}")
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # each tokenizer has its own way to fail
            _check_files(name)
            told = shortened(str(error).strip() or type(error).__name__, 300)
            raise DataError(
                f"dataset.tokenizer={name}: there is no tokenizer that can be read ({told}); {REMEDY}"
            ) from error
        _check_words(name, self._tokenizer)
        self.size = len(self._tokenizer)
        known = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        self.mask: int | None = self._tokenizer.mask_token_id
        # Those of an encoder have other names: a text begins with [CLS] and ends with [SEP].
        marks = {"pad": ("pad",), "bos": ("bos", "cls"), "eos": ("eos", "sep")}
        numbers = {key: [getattr(self._tokenizer, f"{name}_token_id", None) for name in marks[key]] for key in marks}
        self.marks = {
            key: next(number for number in found if number is not None)
            for key, found in numbers.items()
            if any(number is not None for number in found)
        }
        self.padding = next(number for number in known if number is not None)

    def encoded(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> Columns:
        given = (list(texts),) if pairs is None else (list(texts), list(pairs))
        found = self._tokenizer(*given, truncation=True, max_length=length)
        return {name: [list(map(int, row)) for row in rows] for name, rows in found.items() if name != "attention_mask"}

    def stream(self, texts: Sequence[str]) -> list[int]:
        end = self._tokenizer.eos_token_id if len(texts) > 1 else None
        ends = [] if end is None else [end]
        # A text is longer than what the network takes at once, of which the tokenizer would warn.
        rows = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [token for row in rows for token in [*row, *ends]]


def _check_files(name: str, files: Iterable[str] = VOCABULARIES) -> None:
    """Raises DataError for a folder without a vocabulary, where `files` are the names that one may have."""
    if not Path(name).is_dir():  # a name on the hub
        return
    held = (path for path in Path(name).iterdir() if path.name in (*files, "tokenizer.json", "tekken.json"))
    if not any(held) and not any(path.suffix in (".model", ".tiktoken") for path in Path(name).iterdir()):
        raise DataError(f"dataset.tokenizer={name}: there is no tokenizer in it, such as tokenizer.json; {REMEDY}")


def _check_words(name: str, tokenizer: Any) -> None:
    """Raises DataError for a tokenizer without a vocabulary, which transformers makes where there is none."""
    files = [file for file in getattr(tokenizer, "vocab_files_names", {}).values() if isinstance(file, str)]
    if files:  # else every character, or byte, is a token
        _check_files(name, files)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        marks = some(map(str, tokenizer.all_special_tokens))
        raise DataError(f"dataset.tokenizer={name}: its tokenizer knows no words, only the marks {marks}; {REMEDY}")


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer that a setting names. Raises DataError if there is none, ConfigError if transformers is missing."""
    return ByteTokenizer() if name == BYTES else PublishedTokenizer(name)
