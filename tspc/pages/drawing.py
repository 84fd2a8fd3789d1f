"""Figures by matplotlib in a page's colours: drawn once, saved as PNG and SVG, and put into the page."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from tspc.store.files import write_atomically, write_text
from tspc.store.scores import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SOFT = "#1b1f24", "#5f6873", "#d9dde3", "#c7d3ea"
SERIES = ("#1f5fd0", "#c2410c", "#15803d", "#8b2fb8", "#9a6700", "#0f7c8c", "#be185d", "#4b5563")
"""Colours that are dark enough on white; a page in dark mode replaces them by lighter ones."""
MARKERS = "osD^vPX*"
"""Markers of the series, for readers who cannot tell the colours apart."""
WHOLE = "h"
"""The marker of networks that are not decomposed."""
GLYPHS = dict(zip(MARKERS + WHOLE, "●■◆▲▼✚✖★⬢", strict=True))
LEGEND = "legend"
"""The gid of a figure's legend. A narrow page hides it, and shows the drawing's `legend` instead."""
LONGEST = 60
"""The largest number of characters of a name in a figure."""
_FORMLESS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's categories of characters that are no text: XML refuses some, others change the writing direction."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SOFT: "--soft"} | {
    colour: f"--c{number}" for number, colour in enumerate(SERIES)
}
_STYLE: Any = {
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tspc",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Mark:
    """A point of a figure: `tip` is the text that is shown when one points at it, `link` its target or None."""

    tip: str
    link: str | None = None


@dataclass(frozen=True)
class Key:
    """An entry of the legend that the page shows beside the figure."""

    label: str
    glyph: str
    variable: str

    @classmethod
    def of(cls, label: str, glyph: str, colour: str) -> Key:
        return cls(label, glyph, _VARIABLES[colour])


@dataclass(frozen=True)
class Drawing:
    """A figure with its `title`, a `text` that describes it in words, and `marks` for the artists with these gids.

    A narrow page shows `legend` instead of the figure's own legend.
    """

    name: str
    title: str
    text: str
    figure: Figure
    marks: dict[str, Mark] = field(default_factory=dict)
    legend: tuple[Key, ...] = ()

    def put(self, folder: Path) -> dict[str, Any]:
        """Writes `name`.png and `name`.svg; returns the data for a page's template."""
        svg = self.save(folder)
        return {"title": self.title, "text": self.text, "legend": self.legend, "svg": self.inline(svg)}

    def save(self, folder: Path) -> str:
        """Writes `name`.png and `name`.svg; returns the SVG for `inline`."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Title": self.title})
        svg = buffer.getvalue()
        write_text(folder / f"{self.name}.svg", svg)
        write_atomically(
            folder / f"{self.name}.png",
            lambda path: self.figure.savefig(path, format="png", dpi=160, facecolor="white"),
        )
        return svg

    def inline(self, svg: str) -> Markup:
        """The SVG as an element of a page: in the page's colours, with unique ids and a title for screen readers."""
        ElementTree.register_namespace("", _SVG)
        ElementTree.register_namespace("xlink", _XLINK)
        root = ElementTree.fromstring(svg)
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag in (f"{{{_SVG}}}{name}" for name in ("metadata", "style", "title")):
                    parent.remove(child)
        self._mark(root)
        _tidy(root, self.name)
        width = float(root.attrib.pop("width").removesuffix("pt"))
        root.attrib.pop("height")
        # Many points need a way in; a picture is one thing to a screen reader.
        role = "group" if self.marks else "img"
        root.attrib |= {"role": role, "aria-labelledby": f"{self.name}-t {self.name}-d", "class": "plot"}
        root.attrib["style"] = f"--natural: {width * 4 / 3:.0f}px"
        for position, (tag, text) in enumerate((("title", self.title), ("desc", self.text))):
            element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{self.name}-{tag[0]}"})
            element.text = text
            root.insert(position, element)
        text = ElementTree.tostring(root, encoding="unicode")
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
        text = re.sub(r"'DejaVu Sans'(, [^;\"]*sans-serif)?", "var(--font)", text)
        return Markup(text)

    def _mark(self, root: ElementTree.Element) -> None:
        for group in root.iter(f"{{{_SVG}}}g"):
            mark = self.marks.get(group.get("id", ""))
            if mark is None:
                continue
            kind = f"{{{_SVG}}}g" if mark.link is None else f"{{{_SVG}}}a"
            wrapper = ElementTree.Element(kind, {"class": "mark", "data-tip": mark.tip})
            wrapper.attrib["aria-label"] = mark.tip.replace("\n", ", ")
            if mark.link is None:
                wrapper.attrib |= {"tabindex": "0", "role": "img"}
            else:
                wrapper.attrib["href"] = mark.link
            wrapper.extend(list(group))
            for child in list(group):
                group.remove(child)
            group.append(wrapper)


def _tidy(root: ElementTree.Element, name: str) -> None:
    """Makes ids unique, because several figures share a page, and rounds coordinates to a tenth of a point."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key in ("d", "x", "y"):
                element.attrib[key] = re.sub(r"(\d+\.\d)\d+", r"\1", " ".join(value.split()))
            elif key == "id":
                element.attrib[key] = f"{name}-{value}"
            elif key.endswith("href") and value.startswith("#"):
                element.attrib[key] = f"#{name}-{value[1:]}"
            elif "url(#" in value:
                element.attrib[key] = value.replace("url(#", f"url(#{name}-")


@contextmanager
def style() -> Iterator[None]:
    """A context in which figures are made and saved in the pages' style."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font lacks
        yield


def legible(name: str, most: int = LONGEST) -> str:
    """A name in a form for figures: on one line, without characters that cannot be shown, shortened in the middle."""
    text = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in _FORMLESS else c for c in name)
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def canvas(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    left: float = 0.85,
    right: float = 0.1,
    bottom: float = 0.55,
    top: float = 0.15,
    gaps: tuple[float, float] = (0.15, 0.15),
    **options: Any,
) -> tuple[Figure, Any]:
    """A figure, and its axes as a grid. Sizes and margins are in inches, gaps in shares of an axes' width and height.

    Margins are fixed because a layout engine measures every text, which takes longer than the drawing. The figure is
    made without pyplot, so the user's pyplot is not affected.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=gaps[0],
        hspace=gaps[1],
    )
    return figure, axes


def accuracy_axis(axes: Axes, values: list[float], scale: Scale) -> None:
    """The vertical axis for a metric, in points. It shows all `values`, and a range in which chance looks small."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = min(values), max(values)
    if scale.is_share:
        room = max(4.0, 1.3 * (high - low)) - (high - low)
        top = min(high + room / 2, 100 + max(0.9, 0.03 * (high - low)))  # a mark at 100 % is not cut
        bottom = min(top - (high - low) - room, low - 0.06 * (high - low))
        axes.set_ylim(max(0.0, bottom) if low >= 0 else bottom, top)
    else:
        room = max(0.15 * (high - low), 0.02 * max(abs(low), abs(high)), 1e-6)
        axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{scale.unit}"))
    axes.set_ylabel(legible(scale.title, 40))


def plain_log_axis(axis: Any, each: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Plain numbers on a logarithmic axis, at `each` multiple of a power of 10; it may span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(subs=each, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
