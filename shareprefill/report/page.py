"""A self-contained HTML page: text, tables and figures in one file, without scripts or network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from shareprefill.report.drawing import PIXELS_PER_INCH, inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None

_STYLE = Path(__file__).with_name("page.css")
_LEVELS = (2, 3, 4)
# On a narrow screen a figure is scrolled rather than shrunk beyond reading: its least size as a
# share of its own, where it is wider than so many pixels.
_LEAST_SCALE, _NARROW = 0.72, 400
# What HTML cannot hold, and the marks that turn the direction of text round.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)


class Page:
    """Builds a page from top to bottom.

    Whatever it is given is text: names out of a stranger's file cannot bring markup with them, and
    the page's Content-Security-Policy allows no script, no network and no style but its own. It
    follows the reader's light or dark scheme, and prints. Equal input gives equal bytes.

    Args:
        title: Of the page.
        subtitle: What it is about, in a line.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._body: list[str] = []
        self._sections: list[str] = []
        self._styles: dict[str, str] = {}
        self._figures = 0

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; those of level 2 are listed, as links, at the top of the page."""
        assert level in _LEVELS
        if level == _LEVELS[0]:
            self._sections.append(text)
            self._body.append(f'<h2 id="section-{len(self._sections)}">{_escaped(text)}</h2>')
        else:
            self._body.append(f"<h{level}>{_escaped(text)}</h{level}>")

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._body.append(f"<p>{_escaped(paragraph)}</p>")

    def note(self, text: str) -> None:
        """A paragraph that stands out: what is missing here, and how to get it."""
        self._body.append(f'<div class="note" role="note"><p>{_escaped(text)}</p></div>')

    def warning(self, text: str) -> None:
        """A paragraph that must not be missed."""
        self._body.append(
            f'<div class="warning" role="note"><p><strong>Warning:</strong> {_escaped(text)}'
            "</p></div>"
        )

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = ""
    ) -> None:
        """A table; its first column names the rows.

        Args:
            columns: Headings.
            rows: Cells: text and integers as they are, other numbers with three decimals, None as
                a dash. Columns of numbers are set flush right.
            caption: Above the table.
        """
        assert all(len(row) == len(columns) for row in rows)
        numeric = [
            i > 0 and all(not isinstance(row[i], str) or _is_number(row[i]) for row in rows)
            for i in range(len(columns))
        ]
        kinds = [' class="number"' if is_number else "" for is_number in numeric]
        head = "".join(
            f'<th scope="col"{kind}>{_escaped(name)}</th>'
            for name, kind in zip(columns, kinds, strict=True)
        )
        body = "".join(f"<tr>{_row(row, kinds)}</tr>\n" for row in rows)
        # Outside the box that scrolls, where a wide table would take it along.
        above = f'<p class="caption">{_escaped(caption)}</p>\n' if caption else ""
        label = _escaped(caption or "Table: " + ", ".join(columns))
        self._body.append(
            f'{above}<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
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
        self._figures += 1
        name = f"figure-{self._figures}"
        label = _UNSAFE.sub("\ufffd", alt or caption)
        drawing = inline_svg(matplotlib_figure, label, name, self._class)
        if (width := matplotlib_figure.get_figwidth() * PIXELS_PER_INCH) > _NARROW:
            least = self._class(f"min-width:{round(_LEAST_SCALE * width)}px")
            drawing = drawing.replace("<svg ", f'<svg class="{least}" ', 1)
        below = f"<figcaption>{_escaped(caption)}</figcaption>" if caption else ""
        self._body.append(
            f'<figure><div class="scroll" tabindex="0">{drawing}</div>{below}</figure>'
        )

    def html(self) -> str:
        """The page."""
        rules = "".join(f".{name}{{{style}}}\n" for style, name in self._styles.items())
        style = "\n" + _STYLE.read_text(encoding="utf-8") + rules
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        links = "".join(
            f'<li><a href="#section-{number}">{_escaped(text)}</a></li>'
            for number, text in enumerate(self._sections, 1)
        )
        subtitle = f'<p class="subtitle">{_escaped(self._subtitle)}</p>\n' if self._subtitle else ""
        contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if links else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="referrer" content="no-referrer">\n'
            f"<title>{_escaped(self._title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
            f"<header><h1>{_escaped(self._title)}</h1>\n{subtitle}{contents}</header>\n<main>\n"
            + "\n".join(self._body)
            + "\n</main>\n<footer>Made by shareprefill; this file needs no network.</footer>\n"
            "</body>\n</html>\n"
        )

    def _class(self, style: str) -> str:
        # From matplotlib, never from a text: what would end a rule, or fetch, is our own fault.
        assert not re.search(r"[<>{}@\\]|url\((?!#)", style), style
        return self._styles.setdefault(style, f"d{len(self._styles)}")


def _escaped(text: str) -> str:
    return escape(_UNSAFE.sub("\ufffd", text))


def _row(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    first, *others = (_cell(cell) for cell in cells)
    found = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
    return f'<th scope="row">{first}</th>{found}'


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else _escaped(str(value))


def _is_number(cell: Cell) -> bool:
    """Whether a text is a number, perhaps with a sign, a unit or an interval, and no words."""
    return isinstance(cell, str) and bool(re.fullmatch(r"[-+−±]?[\d.,]+[^a-zA-Z]*%?", cell))
