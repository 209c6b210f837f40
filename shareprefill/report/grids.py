"""Grids of layers by heads, drawn as SVG: a cell a head, with words to hover and a place to go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil

# Of a cell, in units of the drawing; a cell has at most, and at least, so many pixels.
_CELL, _MOST, _LEAST = 10, 26, 5
_TOP = 1
_FONT, _FONTS_ACROSS = 5.5, 42
_MOST_LETTERS = 48  # heads a layer
_TICKS = 16


@dataclass(frozen=True)
class Cell:
    """A head in a grid.

    Attributes:
        colour: Hexadecimal.
        words: Shown while the pointer is on it, lines divided by line ends.
        letter: In the cell, where there is room.
        ink: Colour of the letter.
        opacity: Of the colour.
        target: Id in the page that a click goes to; none where empty.
    """

    colour: str
    words: str
    letter: str = ""
    ink: str = "#0b0c0d"
    opacity: float = 1.0
    target: str = ""


@dataclass(frozen=True)
class Grid:
    """A grid of heads.

    Attributes:
        title: Above it.
        layers: Names of the rows.
        cells: Row by row.
        legend: Colour, opacity and words of what the colours mean.
        label: What it shows, for those who do not see it.
    """

    title: str
    layers: Sequence[object]
    cells: Sequence[Sequence[Cell]]
    legend: Sequence[tuple[str, float, str]]
    label: str


def value_legend(least: float, most: float) -> list[tuple[str, float, str]]:
    """Entries of the sequential colours from one value to another."""
    return [
        (value_colour(share, 0.0, 1.0), 1.0, f"{least + share * (most - least):.2f}")
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]


def value_colour(value: float, least: float, most: float) -> str:
    """The sequential colour of a value; values outside take an end's."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from shareprefill.report.drawing import SEQUENTIAL

    share = 0.0 if most <= least else (value - least) / (most - least)
    return to_hex(colormaps[SEQUENTIAL](min(1.0, max(0.0, share))))


def grid_svg(grid: Grid, clean: Callable[[str], str], style_class: Callable[[str], str]) -> str:
    """The `<svg>` element of a grid; the page defines the classes.

    Args:
        grid: To draw.
        clean: Makes text of any origin fit for HTML, before it is escaped.
        style_class: Gives the class that stands for CSS declarations.
    """
    across = max(map(len, grid.cells))
    # Numbers beside the cells stay readable however much the drawing is shrunk.
    font = max(_FONT, _CELL * across / _FONTS_ACROSS)
    left, below = round(2.2 * font + 4), round(font + 7)
    width = left + _CELL * across + 1
    height = _TOP + _CELL * len(grid.cells) + below
    tick = style_class(f"font-size:{font:.3g}px")
    scale = style_class(
        f"max-width:{round(_MOST / _CELL * width)}px;min-width:{round(_LEAST / _CELL * width)}px"
    )
    parts = [
        f'<svg class="grid {scale}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(clean(grid.label))}">'
    ]
    every = max(1, len(grid.cells) // _TICKS, ceil(1.2 * font / _CELL))
    for row, (name, cells) in enumerate(zip(grid.layers, grid.cells, strict=True)):
        top = _TOP + _CELL * row
        if row % every == 0:
            text = escape(clean(str(name)))
            middle = top + 4.7 + font / 3
            parts.append(f'<text class="tick {tick}" x="{left - 3}" y="{middle:.3g}">{text}</text>')
        for column, cell in enumerate(cells):
            at = left + _CELL * column
            parts.append(_cell(cell, at, top, across <= _MOST_LETTERS, clean, style_class))
    for column in range(0, across, max(-(-across // _TICKS), ceil(1.9 * font / _CELL))):
        at = f'x="{left + _CELL * column + 5}" y="{height - 3}"'
        parts.append(f'<text class="tick middle {tick}" {at}>{column}</text>')
    return "".join([*parts, "</svg>"])


def _cell(
    cell: Cell,
    left: int,
    top: int,
    has_letter: bool,
    clean: Callable[[str], str],
    style_class: Callable[[str], str],
) -> str:
    fill = style_class(f"fill:{cell.colour};fill-opacity:{cell.opacity:g}")
    drawn = f'<rect class="{fill}" x="{left}" y="{top}" width="9.4" height="9.4" rx="1"/>'
    if cell.letter and has_letter:
        ink = style_class(f"fill:{cell.ink};font-size:{6 if len(cell.letter) < 3 else 4}px")
        text = escape(clean(cell.letter))
        drawn += f'<text class="letter {ink}" x="{left + 4.7}" y="{top + 6.9}">{text}</text>'
    drawn = f'<g class="cell"><title>{escape(clean(cell.words))}</title>{drawn}</g>'
    return f'<a href="#{escape(cell.target)}">{drawn}</a>' if cell.target else drawn
