"""Layers by heads: one cell a head, coloured by class or by value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from shareprefill.audit.figures import FAINT, Look, cells
from shareprefill.audit.heads import Heads
from shareprefill.report.drawing import INK, MUTED, PAPER, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_WIDTH = 11.0
_LARGEST_CELL = 0.34
# Inches of a cell from which a letter in it can be read.
_LETTERS_FROM = 0.14
_COLOURS_FROM = 0.06
# Beside a grid: its axis, and its colour bar.
_MARGIN, _BAR_MARGIN = 0.75, 1.5
# Inches around a grid of classes: left of it, for its title, for its lower axis, a legend's line.
_LEFT, _TITLE, _AXIS, _ENTRY = 0.55, 0.32, 0.56, 0.2
_NARROWEST = 3.4
_TICK = 0.17  # inches from one layer's number to the next


@dataclass(frozen=True, eq=False)
class Classes:
    """A grid of classes.

    Attributes:
        title: Above it.
        classes: int64 `[K]`.
        looks: Of every class.
        letters_explained: Whether the legend names the letters; a cluster's is its number.
    """

    title: str
    classes: Tensor
    looks: dict[int, Look]
    letters_explained: bool


@dataclass(frozen=True, eq=False)
class Values:
    """A grid of numbers: `[K]`, with its colour map's limits."""

    title: str
    values: Tensor
    least: float
    most: float


def draw_class_grids(heads: Heads, panels: list[Classes]) -> Figure:
    """One grid a panel: a cell a head, in its class's colour, with its letter where it fits."""
    from matplotlib.figure import Figure

    columns = _columns(heads, len(panels), _MARGIN, _LETTERS_FROM)
    rows = -(-len(panels) // columns)
    cell = _cell(heads, columns, _MARGIN)
    width = max(_NARROWEST, cell * heads.width + _MARGIN)
    entries = max(len(_legend(panel)) for panel in panels)
    across, down = cell * heads.width, cell * len(heads.layers)
    below = _AXIS + _ENTRY * -(-entries // _legend_columns(width))
    height = _TITLE + down + below
    size = (columns * width, rows * height)
    figure = Figure(figsize=size)
    # Placed by hand: a layout engine leaves room around cells that stay square.
    for number, panel in enumerate(panels):
        left = number % columns * width + _LEFT
        bottom = (rows - 1 - number // columns) * height + below
        axes = figure.add_axes((left / size[0], bottom / size[1], across / size[0], down / size[1]))
        grid = heads.grid(panel.classes)
        axes.imshow(cells(grid, panel.looks).numpy(), interpolation="none", aspect="auto")
        _frame(axes, heads, panel.title, cell)
        _separate(axes, grid, cell)
        if cell >= _LETTERS_FROM:
            _letters(axes, grid, panel.looks, 72 * cell)
        axes.legend(
            handles=_legend(panel),
            loc="upper left",
            bbox_to_anchor=(left / size[0], (bottom - _AXIS) / size[1]),
            bbox_transform=figure.transFigure,
            borderaxespad=0,
            borderpad=0,
            ncols=_legend_columns(width),
            handlelength=1.2,
            columnspacing=1.2,
        )
    return figure


def _letters(axes: Axes, grid: Tensor, looks: dict[int, Look], points: float) -> None:
    for row, values in enumerate(grid.tolist()):
        for column, value in enumerate(values):
            look = looks[value]
            axes.text(
                column,
                row,
                look.letter,
                ha="center",
                va="center_baseline",
                color=INK if look.colour == MUTED else look.ink,
                fontsize=min(10.0, 0.62 * points, 1.25 * points / max(1, len(look.letter))),
            )


def _separate(axes: Axes, grid: Tensor, cell: float) -> None:
    """Thin lines between the cells."""
    axes.set_xticks([column - 0.5 for column in range(1, grid.shape[1])], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, grid.shape[0])], minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=min(1.2, 6 * cell))
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(False)


def _legend(panel: Classes) -> list[Patch]:
    from matplotlib.patches import Patch

    shown = {
        panel.looks[value].label: panel.looks[value]
        for value in panel.looks
        if bool((panel.classes == value).any())
    }
    return [
        Patch(
            facecolor=look.colour,
            alpha=FAINT if look.colour == MUTED else 1.0,
            label=f"{look.letter}  {label}" if panel.letters_explained else label,
        )
        for label, look in shown.items()
    ]


def _legend_columns(width: float) -> int:
    return max(1, int(width // 1.75))


def draw_value_grids(heads: Heads, panels: list[Values]) -> Figure:
    """One grid a panel, side by side where they fit, each with its colour bar."""
    from matplotlib.figure import Figure

    columns = _columns(heads, len(panels), _BAR_MARGIN, _COLOURS_FROM)
    rows = -(-len(panels) // columns)
    cell = _cell(heads, columns, _BAR_MARGIN)
    width = columns * max(_NARROWEST, cell * heads.width + _BAR_MARGIN)
    height = rows * (max(1.0, cell * len(heads.layers)) + 1.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    for axes, panel in zip(
        figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False
    ):
        picture = axes.imshow(
            heads.grid(panel.values).numpy(),
            vmin=panel.least,
            vmax=panel.most,
            interpolation="none",
            aspect="equal",
        )
        _frame(axes, heads, panel.title, cell)
        figure.colorbar(picture, ax=axes, shrink=0.9, aspect=24).outline.set_visible(False)
    return figure


def _columns(heads: Heads, panels: int, margin: float, least: float) -> int:
    """Grids side by side, such that a cell has at least so many inches."""
    return max(1, min(panels, int(_WIDTH // (heads.width * least + margin))))


def _cell(heads: Heads, columns: int, margin: float) -> float:
    return min(_LARGEST_CELL, (_WIDTH / columns - margin) / heads.width)


def has_letters(heads: Heads) -> bool:
    """Whether grids of classes have room for letters in their cells."""
    return _cell(heads, 1, _MARGIN) >= _LETTERS_FROM


def _frame(axes: Axes, heads: Heads, title: str, cell: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.spines[:].set(visible=True, color=RULE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = max(1, len(heads.layers) // 16, math.ceil(_TICK / cell))
    rows = range(0, len(heads.layers), step)
    axes.set_yticks(rows, [str(heads.layers[row]) for row in rows])
