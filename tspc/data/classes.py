"""The classes of labelled texts: their names, in the order of the numbers that stand for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tspc.data.text_files import Texts
from tspc.data.text_spec import TextSpec
from tspc.errors import DataError, shortened, some

LONGEST_NUMBER = 9
"""Digits of a label that may be the number of a class."""


def classes_of(spec: TextSpec, splits: Mapping[str, Texts]) -> list[str]:
    """The names of the classes, by their numbers.

    They are those of the description if it names them (`spec.classes`): the user's, or the network's own. Else labels
    that are whole numbers from 0 stand for themselves, and other labels are sorted. Raises DataError if there are not
    two classes, or if the labels are none of the named ones.
    """
    train = splits["train"]
    found = set(train.labels or [])
    if spec.classes is not None:
        return _named(spec.classes, found, spec, train.where)
    if all(map(_is_number, found)):
        largest = max(map(int, found))
        count = spec.num_classes or largest + 1
        if 1 < count <= max(1000, 10 * len(found)) and largest < count and (spec.num_classes or len(found) > 1):
            return [str(number) for number in range(count)]
    if len(found) < 2:
        raise DataError(
            f"{train.where}: every text has the label {shortened(min(found))}; two classes are needed at least"
        )
    if spec.num_classes not in (None, len(found)):
        raise DataError(f"dataset.num_classes={spec.num_classes}, but {train.where} has {len(found)} labels")
    return sorted(found)


def _named(classes: Sequence[str], found: set[str], spec: TextSpec, where: str) -> list[str]:
    if spec.num_classes not in (None, len(classes)):
        named = some(map(shortened, classes))
        raise DataError(f"dataset.num_classes={spec.num_classes}, but the classes are {len(classes)}: {named}")
    if not found & set(classes) and all(map(_is_number, found)) and max(map(int, found)) < len(classes):
        return [str(number) for number in range(len(classes))]
    numbered(sorted(found), classes, where, is_named=True)
    return list(classes)


def numbered(labels: Sequence[str], classes: Sequence[str], where: str, is_named: bool = False) -> list[int]:
    """The number of the class for each label; capitals do not matter where only they differ.

    Raises DataError for a label that is none of the classes. `is_named` says that not the training texts name them.
    """
    exact = {name: number for number, name in enumerate(classes)}
    folded = {name.casefold(): number for number, name in enumerate(classes)}
    usual = folded if len(folded) == len(exact) else {}
    found = [exact.get(label, usual.get(label.casefold())) for label in labels]
    if None not in found:
        return [number for number in found if number is not None]
    strange = some(
        map(shortened, sorted({label for label, number in zip(labels, found, strict=True) if number is None}))
    )
    if not is_named:
        raise DataError(f"{where}: the label {strange} is in no training text")
    raise DataError(
        f"{where}: the label {strange} is none of the classes that the network answers with, which are "
        f"{some(map(shortened, classes))}; write these names, or give your own in the order of the network's answers: "
        "dataset.classes=[FIRST,SECOND]"
    )


def _is_number(label: str) -> bool:
    """Whether a label is the number of a class, written as usual: 01 is a name."""
    return label.isdecimal() and len(label) <= LONGEST_NUMBER and str(int(label)) == label
