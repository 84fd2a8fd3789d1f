"""What the numbers of a metric mean, and the records that hold them. All of it is plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tspc.errors import shortened
from tspc.store.schemas import OTHER_METRIC, problem

TOP1 = "top1"
"""The metric that judges if the user names none; its records hold no name."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How the numbers of a metric are read.

    `label` is its name for people, and `title` a longer one for headings. With `is_share` a number from 0 to 1 (a
    cosine from -1) is shown in percent, and its *points* are percent. Points of other metrics are their own unit. With
    `is_proportion` the number is the share of inputs that are right, so its standard error is known.
    """

    name: str
    label: str
    title: str
    is_share: bool = False
    is_higher_better: bool = True
    is_proportion: bool = False

    @property
    def heading(self) -> str:
        """The title with a capital at its beginning; the name of a function is left as it is."""
        return self.title[:1].upper() + self.title[1:] if self.name in SCALES else self.title

    @property
    def subject(self) -> str:
        """What a heading calls the number: of top-1 just the accuracy."""
        return "Accuracy" if self.name == TOP1 else self.heading

    def points(self, value: float) -> float:
        """100 · value for a share, else the value."""
        return 100 * value if self.is_share else value

    def gain(self, value: float) -> float:
        """A number that is higher where the value is better."""
        return value if self.is_higher_better else -value

    def lost(self, before: float, after: float) -> float:
        """How much worse `after` is than `before`, in the unit of the values; negative if it is better."""
        return before - after if self.is_higher_better else after - before

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is than `before`, in points."""
        return self.points(self.lost(before, after))

    def change(self, before: float, after: float) -> float:
        """The change of the number in points; it is positive if the number grew, also where lower is better."""
        return self.points(after - before)

    def number(self, points: float) -> str:
        """Points without their unit: two decimals for a share, else four digits."""
        return self.form.format(points)

    def signed(self, points: float) -> str:
        """Points with their sign, without their unit."""
        return self.signed_form.format(points)

    @property
    def form(self) -> str:
        """How a number in points is written."""
        return "{:.2f}" if self.is_share else "{:.4g}"

    @property
    def signed_form(self) -> str:
        """How a change in points is written."""
        return "{:+.2f}" if self.is_share else "{:+.4g}"

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.number(self.points(value))}{self.unit}"

    @property
    def unit(self) -> str:
        """What follows a number in points."""
        return " %" if self.is_share else ""


_SHARE_OF_INPUTS = {"is_share": True, "is_proportion": True}
SCALES = {
    scale.name: scale
    for scale in (
        Scale(name=TOP1, label="top-1", title="top-1 accuracy", **_SHARE_OF_INPUTS),
        Scale(name="top5", label="top-5", title="top-5 accuracy", **_SHARE_OF_INPUTS),
        Scale(name="agreement", label="agreement", title="agreement with the reference", **_SHARE_OF_INPUTS),
        Scale(name="cosine", label="cosine", title="cosine with the reference", is_share=True),
        Scale(name="perplexity", label="perplexity", title="perplexity", is_higher_better=False),
        Scale(name="mse", label="squared error", title="mean squared error", is_higher_better=False),
    )
}
"""The metrics that are built in, by name."""


def scale_of(name: str) -> Scale:
    """The scale of a metric; any other name is a user's function, of which only the text is known."""
    label = shortened(name.rpartition(":")[2] or name)  # the record may be somebody else's
    return SCALES.get(name) or Scale(name=name, label=label, title=label)


def record_of(scale: Scale, value: float, count: int, top5: float | None = None) -> dict[str, Any]:
    """The record of a measurement over `count` inputs; `top5` is told beside top-1 if there are many classes."""
    if scale.name == TOP1:
        return {"top1": value, "top5": top5, "images": count}
    return {"metric": scale.name, "value": value, "images": count}


def scale_in(record: dict[str, Any] | None) -> Scale:
    """The scale of the number in a record; of top-1 if there is no record."""
    return scale_of(record["metric"] if record is not None and _is_other(record) else TOP1)


def value_in(record: dict[str, Any]) -> float:
    """The number in a record."""
    return record["value"] if _is_other(record) else record["top1"]


def top5_in(record: dict[str, Any] | None) -> float | None:
    """The share of right answers among five that stands beside top-1; None if there is none."""
    return None if record is None or _is_other(record) else record.get("top5")


def shown(record: dict[str, Any] | None) -> str:
    """The number in a record, with its unit."""
    return "not measured" if record is None else scale_in(record).text(value_in(record))


def described(record: dict[str, Any] | None, default: str = TOP1) -> str:
    """The number in a record with its label, as in "top-1 93.20 %"; without a record with the label of `default`."""
    scale = scale_of(default) if record is None else scale_in(record)
    return f"{scale.label} {shown(record)}"


def _is_other(record: dict[str, Any]) -> bool:
    """Whether a record is that of another metric than top-1."""
    return problem(record, OTHER_METRIC) is None
