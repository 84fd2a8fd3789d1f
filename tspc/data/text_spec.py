"""The descriptions of data sets that are no images: texts in files, and what a function of the user's gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tspc.system.bounds import SHARE_BELOW_ONE, Bounds, out_of_range, shown

BYTES = "bytes"
"""The tokenizer that is built in: a token for each byte."""
TEXT_KINDS = ("text", "datasets")
LONGEST = Bounds(2, 1e6)


@dataclass(frozen=True)
class TextSpec:
    """Texts for a task, and how they become token numbers.

    `kind` is `text` (files in the data_dir) or `datasets` (the library of this name: `path` names a data set of the
    hub or a folder of its files, `subset` a part of it). `text`, `text_pair` and `label` are columns; a `text_pair` of
    None is the column of that name, where there is one. A text has at most `length` tokens, the rest is cut off; in
    language modelling this is the length of the blocks. There the network predicts the next token or, with `masked`
    above 0, this share of the tokens, which are hidden from it (Devlin et al., BERT, arXiv:1810.04805). `tokenizer` is
    a folder, a name on the hub, or `bytes`.
    `num_classes` may be None if the labels in the files give it. `classes` are the labels in the order of the network's
    answers; None stands for the names that a published network gives its classes, or else the order of their names.
    `task` says what the files hold.
    """

    kind: str
    name: str
    task: str
    num_classes: int | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    tokenizer: str | None = None
    length: int = 128
    masked: float = 0.0
    path: str | None = None
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    classes: tuple[str, ...] | None = None

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        allowed = {"kind": TEXT_KINDS, "num_classes": Bounds(1, 1e7), "length": LONGEST, "masked": SHARE_BELOW_ONE}
        found = out_of_range(self, where, allowed)
        if self.masked and self.task != "language_modelling":
            found.append(f"{where}.masked={shown(self.masked)} has an effect only with task=language_modelling")
        if self.classes is not None and self.task != "text_classification":
            found.append(f"{where}.classes={shown(self.classes)} has an effect only with task=text_classification")
        elif self.classes is not None and not 1 < len(self.classes) == len(set(self.classes)):
            found.append(f"{where}.classes={shown(self.classes)}: expected two different names at least, or null")
        if self.kind == "text":
            given = [
                f"{key}={shown(getattr(self, key))}" for key in ("path", "subset") if getattr(self, key) is not None
            ]
            found += [f"{where}.{text} has an effect only with dataset=datasets" for text in given]
        return found


@dataclass(frozen=True)
class OwnSpec:
    """Data that a function of the user's gives: `factory`, as package.module:function, called with `options`.

    `num_classes` may be None if the targets show it.
    """

    kind: str
    name: str
    factory: str | None = None
    num_classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def problems(self, where: str) -> list[str]:
        """One line for each value out of range."""
        found = out_of_range(self, where, {"kind": (OWN_KIND,), "num_classes": Bounds(1, 1e7)})
        if not self.factory:
            found.append(f"{where}.factory={shown(self.factory)}: dataset=factory needs package.module:function")
        return found


OWN_KIND = "factory"
