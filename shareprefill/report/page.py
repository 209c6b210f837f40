"""A self-contained HTML page: text, tables and figures in one file, without scripts or network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from shareprefill.report.drawing import PIXELS_PER_INCH, inline_svg
from shareprefill.report.grids import Grid, grid_svg

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

Cell = str | int | float | None

_STYLE = Path(__file__).with_name("page.css")
_TEMPLATE = Path(__file__).with_name("page.html.j2")
_LEVELS = (2, 3, 4)
# On a narrow screen a figure is scrolled rather than shrunk beyond reading: its least size as a
# share of its own, where it is wider than so many pixels.
_LEAST_SCALE, _NARROW = 0.72, 400
# Tables of more columns may be wider than the text.
_WIDE = 8
# What HTML cannot hold, and the marks that turn the direction of text round.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)


@dataclass(frozen=True)
class Picture:
    """Small pictures that belong together, under a caption.

    Attributes:
        caption: What they are of.
        images: PNG files with words for those who do not see them.
    """

    caption: str
    images: Sequence[tuple[bytes, str]]

    def sources(self) -> list[tuple[str, str]]:
        """Addresses that hold the images themselves, with their words."""
        return [
            (f"data:image/png;base64,{base64.b64encode(png).decode()}", words)
            for png, words in self.images
        ]


class Page:
    """Builds a page from top to bottom.

    Whatever it is given is text: names out of a stranger's file cannot bring markup with them, and
    the page's Content-Security-Policy allows no script, no network and no style but its own. It
    follows the reader's light or dark scheme, and prints. Equal input gives equal bytes.

    Args:
        title: Of the page.
        subtitle: What it is about, in a line.
        mark: What it is of (`marks.mark_of`), to be read before the file is replaced.
    """

    def __init__(self, title: str, subtitle: str = "", mark: str = "") -> None:
        self._title, self._subtitle, self._mark = title, subtitle, mark
        self._blocks: list[dict[str, Any]] = []
        self._sections: list[str] = []
        self._styles: dict[str, str] = {}
        self._figures = 0

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; those of level 2 are listed, as links, at the top of the page."""
        assert level in _LEVELS
        if level == _LEVELS[0]:
            self._sections.append(text)
            self._add("section", text=text, number=len(self._sections))
        else:
            self._add("heading", text=text, level=level)

    def verdict(self, text: str, *, is_good: bool) -> None:
        """What the page comes to, in a sentence or two: it stands out, above everything."""
        self._add("verdict", text=text, is_good=is_good)

    @contextmanager
    def details(self, summary: str, name: str = "") -> Iterator[None]:
        """What is added inside is folded away under a line, until that is clicked on.

        Args:
            summary: The line.
            name: Id that a cell of a grid may lead to.
        """
        self._add("details", summary=summary, name=name)
        yield
        self._add("end of details")

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._add("text", text=paragraph)

    def note(self, text: str) -> None:
        """A paragraph that stands out: what is missing here, and how to get it."""
        self._add("note", text=text)

    def warning(self, text: str) -> None:
        """A paragraph that must not be missed."""
        self._add("warning", text=text)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        caption: str = "",
        names: Sequence[str] = (),
    ) -> None:
        """A table; its first column names the rows.

        Args:
            columns: Headings.
            rows: Cells: text and integers as they are, other numbers with three decimals, None as
                a dash. Columns of numbers are set flush right.
            caption: Above the table.
            names: Ids of the rows, that a cell of a grid may lead to; none where empty.
        """
        assert all(len(row) == len(columns) for row in rows)
        numeric = [
            i > 0 and all(not isinstance(row[i], str) or _is_number(row[i]) for row in rows)
            for i in range(len(columns))
        ]
        self._add(
            "table",
            columns=columns,
            rows=[[_parts(_cell(cell)) for cell in row] for row in rows],
            is_wide=len(columns) > _WIDE,
            numeric=numeric,
            caption=caption,
            names=names,
            label=caption or "Table: " + ", ".join(columns),
        )

    def figure(self, matplotlib_figure: Figure, caption: str = "", alt: str = "") -> None:
        """A figure as inline SVG; build it inside `figure_style()`.

        Args:
            matplotlib_figure: Made as `Figure(...)`, not through pyplot. Text of unknown origin in
                it goes through `plain_label`.
            caption: Below the figure.
            alt: What it shows, for those who do not see it; the caption where empty.
        """
        assert caption or alt
        drawing = self._drawn(matplotlib_figure, alt or caption)
        if (width := matplotlib_figure.get_figwidth() * PIXELS_PER_INCH) > _NARROW:
            least = self._class(f"min-width:{round(_LEAST_SCALE * width)}px")
            drawing = drawing.replace("<svg ", f'<svg class="{least}" ', 1)
        # An `<svg>` element, escaped as it was made.
        self._add("figure", drawing=Markup(drawing), caption=caption)  # noqa: S704

    def panels(self, figures: Sequence[Figure], caption: str, alt: str) -> None:
        """Figures of one panel each: side by side where there is room, below each other where not.

        Args:
            figures: As `figure` takes them, four to five inches wide.
            caption: Below all of them.
            alt: What they show, for those who do not see them.
        """
        drawn = []
        for number, figure in enumerate(figures, 1):
            label = alt if len(figures) == 1 else f"{alt} ({number} of {len(figures)})"
            drawing = self._drawn(figure, label).replace("<svg ", '<svg class="whole" ', 1)
            # Escaped as it was made.
            drawn.append(Markup(drawing))  # noqa: S704
        self._add("panels", drawings=drawn, caption=caption)

    def grids(self, grids: Sequence[Grid], caption: str = "") -> None:
        """Grids of heads, side by side where there is room."""
        drawn = [
            {
                "title": grid.title,
                # Escaped as it was made.
                "drawing": Markup(grid_svg(grid, _clean, self._class)),  # noqa: S704
                "legend": [
                    (self._class(f"background:{colour};opacity:{opacity:g}"), words)
                    for colour, opacity, words in grid.legend
                ],
            }
            for grid in grids
        ]
        self._add("grids", grids=drawn, caption=caption)

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Small pictures of heads, as many in a row as there is room for."""
        self._add("pictures", pictures=pictures)

    def html(self) -> str:
        """The page."""
        rules = "".join(f".{name}{{{style}}}\n" for style, name in self._styles.items())
        style = "\n" + _STYLE.read_text(encoding="utf-8") + rules
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        return _template().render(
            title=self._title,
            mark=self._mark,
            subtitle=self._subtitle,
            sections=self._sections,
            blocks=self._blocks,
            # Our own file and `_class`'s rules, which no text gets into.
            style=Markup(style),  # noqa: S704
            style_digest=digest,
        )

    def _add(self, kind: str, **content: Any) -> None:
        self._blocks.append({"kind": kind, **content})

    def _drawn(self, figure: Figure, label: str) -> str:
        self._figures += 1
        return inline_svg(figure, _clean(label), f"figure-{self._figures}", self._class)

    def _class(self, style: str) -> str:
        # From matplotlib, never from a text: what would end a rule, or fetch, is our own fault.
        assert not re.search(r"[<>{}@\\]|url\((?!#)", style), style
        return self._styles.setdefault(style, f"d{len(self._styles)}")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_displayable,
        keep_trailing_newline=True,
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _displayable(value: Any) -> Any:
    """What the template shows of a value, before it is escaped; drawings as they are."""
    return _clean(value) if type(value) is str else value


def _clean(text: str) -> str:
    return _UNSAFE.sub("\ufffd", text)


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _parts(cell: str) -> tuple[str, str]:
    """A cell, and the interval after its number: that has a line of its own."""
    found = re.fullmatch(r"([-+−\d.e]+) (\[[-+−\d., e]+\])", cell)
    return (cell, "") if found is None else (found[1], found[2])


def _is_number(cell: Cell) -> bool:
    """Whether a text is a number, perhaps with a sign, a unit or an interval, and no words."""
    if not isinstance(cell, str):
        return False
    plain = re.sub(r"(?<=\d)e[-+]?\d+", "", cell)  # 8.6e-05
    return bool(re.fullmatch(r"[-+−±]?[\d.,]+[^a-zA-Z]*%?", plain))
