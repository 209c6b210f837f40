"""Figures: the look that all of them have, and their way into a page as inline SVG.

Ink, muted, rule and paper are stand-ins: in a page they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from shareprefill.files import printable
from shareprefill.report.marks import MARK

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1b1c1e", "#5d626b", "#d6d9de", "#fefefd"
# Far apart for all common kinds of colour vision, and seen on white and on near-black (a test holds
# both). Use with MARKERS or labels: never colour alone.
SERIES = ("#2f9fd8", "#e58a0c", "#146b45", "#e0245e", "#86600f", "#2450dd", "#7746b0", "#989da4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# A map of even lightness steps.
SEQUENTIAL = "viridis"

PIXELS_PER_INCH = 96  # of CSS
FILE_KINDS = ("svg", "png")
_DOTS = 144  # an inch of a PNG
# Of legends: entries and letters from which, and up to which, there are two in a line.
_TWO_COLUMNS_FROM, _SHORT, _LINE = 5, 20, 46
_COLOURS = 64  # of a picture
_SALT = "shareprefill"
_SCHEME = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font-family:[^;]*(;|$)")
# Elements of a drawing; anything else, a script above all, would be a surprise.
_ELEMENTS = {
    *("svg", "g", "defs", "use", "path", "rect", "circle", "line", "polygon", "polyline"),
    *("text", "tspan", "image", "clipPath", "pattern", "linearGradient", "stop"),
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib's settings for the block: build figures inside it, as `Figure(...)`.

    Sets matplotlib's own global settings and restores them, so it is not for several threads.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "axes.axisbelow": True,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.labelsize": 10,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "axes.titlecolor": INK,
                "axes.titlelocation": "left",
                "axes.titlesize": 10.5,
                "axes.titleweight": "bold",
                "font.size": 10,
                "grid.color": RULE,
                "grid.linewidth": 0.7,
                "image.cmap": SEQUENTIAL,
                "image.interpolation": "nearest",
                "legend.edgecolor": RULE,
                "legend.facecolor": "none",
                "legend.fontsize": 9,
                "legend.frameon": False,
                "lines.linewidth": 1.6,
                "patch.edgecolor": PAPER,
                "svg.fonttype": "none",
                "svg.hashsalt": _SALT,
                "text.color": INK,
                "xtick.color": MUTED,
                "xtick.labelcolor": INK,
                "xtick.labelsize": 9,
                "ytick.color": MUTED,
                "ytick.labelcolor": INK,
                "ytick.labelsize": 9,
            }
        )
        yield


def legend_figure(handles: Sequence[Artist], labels: Sequence[str]) -> Figure:
    """A legend alone, for figures of one panel each."""
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

    is_short = len(labels) >= _TWO_COLUMNS_FROM and max(map(len, labels)) <= _SHORT
    lines = [fill(label, _LINE) for label in labels]
    height = sum(0.05 + 0.17 * (1 + line.count("\n")) for line in lines)
    figure = Figure(figsize=(4.2, 0.3 + (height / 2 + 0.22 if is_short else height)))
    legend = figure.legend(handles, lines, loc="center left", ncols=2 if is_short else 1)
    for handle in legend.legend_handles:
        # Large enough to tell shapes whatever the points' size.
        if isinstance(handle, PathCollection):
            handle.set_sizes([48.0])
    return figure


def plain_label(text: object, limit: int = 60) -> str:
    """Text of any origin as a figure shows it: on one line, cut short, dollars no mathematics."""
    return printable(text, limit).replace("$", r"\$")


def inline_svg(figure: Figure, label: str, name: str, style_class: Callable[[str], str]) -> str:
    """A figure as an `<svg>` element to stand inside an HTML page, the same for an equal figure.

    Args:
        figure: Drawn on a transparent ground.
        label: What it shows, for those who do not see it.
        name: Prefix of the ids, unique in the page.
        style_class: Gives the class that stands for CSS declarations; the page defines it, so
            that no element has a style of its own.

    Returns:
        The element.
    """
    root = ElementTree.fromstring(_draw(figure, {}, transparent=True))  # noqa: S314  matplotlib wrote it, not a stranger
    for defs in root.iter(f"{_SVG}defs"):
        for style in defs.findall(f"{_SVG}style"):
            defs.remove(style)
    names = _referenced(root, name)
    width, height = (round(inches * PIXELS_PER_INCH) for inches in figure.get_size_inches())
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": str(width),
        "height": str(height),
        "role": "img",
        "aria-label": label,
    }
    return _element(root, names, style_class)


def figure_file(figure: Figure, kind: str, mark: str = "") -> bytes:
    """A figure as a file of its own, on the pages' light ground, the same for an equal figure.

    Args:
        figure: To draw.
        kind: One of `FILE_KINDS`.
        mark: What it is of (`marks.mark_of`), to be read before the file is replaced.
    """
    title = {"Title": f"{MARK}: {mark}"} if mark else {}
    if kind == "svg":
        return _draw(figure, title, facecolor=PAPER).encode()
    drawn = io.BytesIO()
    of_file = {"Software": None} | title
    figure.savefig(drawn, format=kind, dpi=_DOTS, facecolor=PAPER, metadata=of_file)
    return drawn.getvalue()


def value_png(values: Any, hidden: Any) -> bytes:
    """Numbers from 0 to 1 in the sequential colours, a pixel each, as a PNG file.

    Args:
        values: NumPy array `[rows, columns]`.
        hidden: Which of them are transparent, bool of the same shape.
    """
    from matplotlib import colormaps

    colours = colormaps[SEQUENTIAL](values, bytes=True)
    colours[hidden] = 0
    return colour_png(colours)


def colour_png(colours: Any) -> bytes:
    """Colours, NumPy uint8 `[rows, columns, 4]`, as a PNG file of few colours."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(colours).quantize(_COLOURS).save(held, "PNG", optimize=True)
    return held.getvalue()


def _draw(figure: Figure, title: dict[str, str], **ground: Any) -> str:
    from matplotlib import rc_context

    drawn = io.StringIO()
    nothing: dict[str, str | None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": _SALT}):
        figure.savefig(drawn, format="svg", metadata=nothing | title, **ground)
    return drawn.getvalue()


def _referenced(root: ElementTree.Element, prefix: str) -> dict[str, str]:
    """New names of the ids that something refers to; the others are of no use."""
    found: dict[str, str] = {}
    for element in root.iter():
        for key, value in element.attrib.items():
            targets = [value[1:]] if key == _LINK and value[0] == "#" else _REFERENCE.findall(value)
            for target in targets:
                found.setdefault(target, f"{prefix}-{len(found)}")
    return found


def _element(
    element: ElementTree.Element, names: dict[str, str], style_class: Callable[[str], str]
) -> str:
    tag = element.tag.removeprefix(_SVG)
    assert tag in _ELEMENTS, f"{tag} in a drawing"
    attributes = "".join(
        f' {key}="{escape(value)}"'
        for key, value in _attributes(element.attrib, names, style_class)
    )
    inside = escape((element.text or "").strip())
    inside += "".join(_element(child, names, style_class) for child in element)
    return f"<{tag}{attributes}>{inside}</{tag}>" if inside else f"<{tag}{attributes}/>"


def _attributes(
    attributes: dict[str, str], names: dict[str, str], style_class: Callable[[str], str]
) -> Iterator[tuple[str, str]]:
    for key, value in attributes.items():
        value = _REFERENCE.sub(lambda found: f"url(#{names[found[1]]})", value)
        if key == "id":
            if value in names:
                yield key, names[value]
        elif key == "style":
            if declarations := _in_scheme(_FONT.sub("", value).strip(" ;")):
                yield "class", style_class(declarations)
        elif key == _LINK and value.startswith("#"):
            yield "href", f"#{names[value[1:]]}"
        elif key == _LINK:
            assert value.startswith("data:image/png;base64,")
            yield "href", "".join(value.split())
        elif key in ("d", "points", "transform", "x", "y", "width", "height"):
            yield key, " ".join(_DECIMALS.sub(_rounded, value).split())
        else:
            yield key, value


def _in_scheme(declarations: str) -> str:
    for colour, variable in _SCHEME.items():
        declarations = declarations.replace(colour, variable)
    return declarations


def _rounded(number: re.Match[str]) -> str:
    # Two decimals of a point; adding zero makes minus zero zero.
    return f"{round(float(number[0]), 2) + 0.0:g}"
